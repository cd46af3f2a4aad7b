//! Signed tokens: who a JSON Web Token (RFC 7519) says that its bearer is.
//!
//! Owns: the parsing of tokens and of issuers' keys, the signature check, and the rules that a
//! token's claims must satisfy. Receives the token's text, the issuer that the administrator
//! configured, and the time. Emits an [`Identity`], or a [`TokenError`] that says which rule the
//! token breaks. Never trusts what the token says about itself: the issuer's entry names the
//! algorithm and the key. Never puts any part of a token into an error.
//!
//! With an `act` claim (RFC 8693, section 4.1) the outermost `act.sub` is the acting agent, and
//! `sub` is the person on whose behalf it acts. Earlier actors that `act` may nest "are not to be
//! considered in access control decisions", and are ignored.

use crate::event::{Actor, ActorKind, Trust};
use aws_lc_rs::signature::{self as aws, ParsedPublicKey, RsaPublicKeyComponents};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk};
use jsonwebtoken::{Algorithm as Jwa, DecodingKey, DecodingKeyKind};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::fmt;

/// Bytes of the longest token that is looked at.
pub const MAX_TOKEN: usize = 16 * 1024;
/// Groups that a token may list.
pub const MAX_GROUPS: usize = 64;
/// Characters of a subject, a group or a token's id.
pub const MAX_NAME: usize = 256;
/// Bytes of the shortest HS256 secret: the size of the hash (RFC 7518, section 3.2).
pub const MIN_SECRET: usize = 32;
/// 9999-12-31: a later date is one in milliseconds, or nonsense.
const MAX_DATE: f64 = 253_402_300_799.0;

/// Signature algorithms that an issuer may use (RFC 7518, RFC 8037).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// HMAC with SHA-256.
    Hs256,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    Rs384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    Rs512,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// ECDSA with P-256 and SHA-256.
    Es256,
    /// ECDSA with P-384 and SHA-384.
    Es384,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Hs256,
        Self::Rs256,
        Self::Rs384,
        Self::Rs512,
        Self::Ps256,
        Self::Es256,
        Self::Es384,
        Self::EdDsa,
    ];

    /// The name that tokens use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hs256 => "HS256",
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
        }
    }

    /// The algorithm with this name. Names are case-sensitive.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name)
    }

    fn jwa(self) -> Jwa {
        match self {
            Self::Hs256 => Jwa::HS256,
            Self::Rs256 => Jwa::RS256,
            Self::Rs384 => Jwa::RS384,
            Self::Rs512 => Jwa::RS512,
            Self::Ps256 => Jwa::PS256,
            Self::Es256 => Jwa::ES256,
            Self::Es384 => Jwa::ES384,
            Self::EdDsa => Jwa::EdDSA,
        }
    }

    /// What an issuer's entry must hold for this algorithm.
    #[must_use]
    pub fn key_kind(self) -> &'static str {
        match self {
            Self::Hs256 => "a secret of at least 32 bytes",
            Self::Rs256 | Self::Rs384 | Self::Rs512 | Self::Ps256 => {
                "an RSA public key of 2048 to 8192 bits"
            }
            Self::Es256 => "a public key on the curve P-256",
            Self::Es384 => "a public key on the curve P-384",
            Self::EdDsa => "an Ed25519 public key",
        }
    }
}

/// Why a key cannot be an issuer's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyError {
    /// The secret is shorter than [`MIN_SECRET`].
    ShortSecret,
    /// A public key, or a JWK, is given as the secret of HS256.
    NotASecret,
    /// A private key is given.
    PrivateKey,
    /// The PEM block is not a public key.
    PemLabel,
    /// Neither PEM nor JWK.
    Format,
    /// A JWK names another algorithm.
    JwkAlgorithm,
    /// The key is not of the kind that the algorithm needs.
    Kind(Algorithm),
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ShortSecret => write!(f, "the secret is shorter than {MIN_SECRET} bytes"),
            Self::NotASecret => f.write_str("HS256 needs a secret, not a public key or a JWK"),
            Self::PrivateKey => f.write_str("the key is a private key"),
            Self::PemLabel => f.write_str("the PEM block is not a public key"),
            Self::Format => f.write_str("the key is neither a PEM public key nor a JWK"),
            Self::JwkAlgorithm => f.write_str("the JWK is for another algorithm"),
            Self::Kind(a) => write!(
                f,
                "the key is not {}, which {} needs",
                a.key_kind(),
                a.name()
            ),
        }
    }
}

impl std::error::Error for KeyError {}

/// The key of an issuer, known to fit its algorithm.
#[derive(Clone)]
pub struct Key {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("algorithm", &self.algorithm)
            .finish_non_exhaustive()
    }
}

impl Key {
    /// Reads a key as the administrator gives it: the secret itself for HS256, else a PEM public
    /// key (`PUBLIC KEY` or `RSA PUBLIC KEY`) or one JWK.
    ///
    /// # Errors
    /// If the text is no such key, or the key does not fit the algorithm.
    pub fn parse(algorithm: Algorithm, text: &str) -> Result<Self, KeyError> {
        let trimmed = text.trim();
        let key = if algorithm == Algorithm::Hs256 {
            if trimmed.starts_with("-----BEGIN") || serde_json::from_str::<Jwk>(trimmed).is_ok() {
                return Err(KeyError::NotASecret);
            }
            if text.len() < MIN_SECRET {
                return Err(KeyError::ShortSecret);
            }
            DecodingKey::from_secret(text.as_bytes())
        } else if trimmed.starts_with('{') {
            from_jwk(algorithm, trimmed)?
        } else if trimmed.starts_with("-----BEGIN") {
            from_pem(algorithm, trimmed)?
        } else {
            return Err(KeyError::Format);
        };
        check(algorithm, &key)?;
        Ok(Self { algorithm, key })
    }
}

fn from_pem(algorithm: Algorithm, text: &str) -> Result<DecodingKey, KeyError> {
    let block = pem::parse(text).map_err(|_| KeyError::Format)?;
    match block.tag() {
        "PUBLIC KEY" | "RSA PUBLIC KEY" => {}
        tag if tag.ends_with("PRIVATE KEY") => return Err(KeyError::PrivateKey),
        _ => return Err(KeyError::PemLabel),
    }
    let der = block.contents();
    Ok(match algorithm {
        Algorithm::Es256 | Algorithm::Es384 => DecodingKey::from_ec_der(der),
        Algorithm::EdDsa => DecodingKey::from_ed_der(der),
        _ => {
            let public =
                aws_lc_rs::rsa::PublicKey::from_der(der).map_err(|_| KeyError::Kind(algorithm))?;
            let parts = RsaPublicKeyComponents::<Vec<u8>>::from(&public);
            DecodingKey::from_rsa_raw_components(&parts.n, &parts.e)
        }
    })
}

fn from_jwk(algorithm: Algorithm, text: &str) -> Result<DecodingKey, KeyError> {
    let value: Value = serde_json::from_str(text).map_err(|_| KeyError::Format)?;
    if value.get("d").is_some() {
        return Err(KeyError::PrivateKey);
    }
    let named = value
        .get("alg")
        .is_none_or(|a| a.as_str() == Some(algorithm.name()));
    let signs = value.get("use").is_none_or(|u| u.as_str() == Some("sig"));
    if !named || !signs {
        return Err(KeyError::JwkAlgorithm);
    }
    let jwk: Jwk = serde_json::from_value(value).map_err(|_| KeyError::Format)?;
    let fits = match (&jwk.algorithm, algorithm) {
        (AlgorithmParameters::EllipticCurve(p), Algorithm::Es256) => p.curve == EllipticCurve::P256,
        (AlgorithmParameters::EllipticCurve(p), Algorithm::Es384) => p.curve == EllipticCurve::P384,
        (AlgorithmParameters::OctetKeyPair(p), Algorithm::EdDsa) => {
            p.curve == EllipticCurve::Ed25519
        }
        (
            AlgorithmParameters::RSA(_),
            Algorithm::Rs256 | Algorithm::Rs384 | Algorithm::Rs512 | Algorithm::Ps256,
        ) => true,
        _ => false,
    };
    if !fits {
        return Err(KeyError::Kind(algorithm));
    }
    DecodingKey::from_jwk(&jwk).map_err(|_| KeyError::Format)
}

/// Fails where every signature check with the key would fail.
fn check(algorithm: Algorithm, key: &DecodingKey) -> Result<(), KeyError> {
    let rsa = |e| {
        if let DecodingKeyKind::RsaModulusExponent { n, e: exponent } = key.kind() {
            let zeros = n.iter().take_while(|b| **b == 0).count();
            let bits =
                (n.len() - zeros) * 8 - n.get(zeros).map_or(0, |b| b.leading_zeros() as usize);
            let parts = RsaPublicKeyComponents {
                n: &n[zeros..],
                e: exponent,
            };
            (2048..=8192).contains(&bits) && parts.to_parsed_public_key(e).is_ok()
        } else {
            false
        }
    };
    let raw = |a: &'static dyn aws::VerificationAlgorithm| match key.kind() {
        DecodingKeyKind::SecretOrDer(bytes) => ParsedPublicKey::new(a, bytes).is_ok(),
        DecodingKeyKind::RsaModulusExponent { .. } => false,
    };
    let ok = match algorithm {
        Algorithm::Hs256 => true,
        Algorithm::Rs256 => rsa(&aws::RSA_PKCS1_2048_8192_SHA256),
        Algorithm::Rs384 => rsa(&aws::RSA_PKCS1_2048_8192_SHA384),
        Algorithm::Rs512 => rsa(&aws::RSA_PKCS1_2048_8192_SHA512),
        Algorithm::Ps256 => rsa(&aws::RSA_PSS_2048_8192_SHA256),
        Algorithm::Es256 => raw(&aws::ECDSA_P256_SHA256_FIXED),
        Algorithm::Es384 => raw(&aws::ECDSA_P384_SHA384_FIXED),
        Algorithm::EdDsa => raw(&aws::ED25519),
    };
    if ok {
        Ok(())
    } else {
        Err(KeyError::Kind(algorithm))
    }
}

/// Whose tokens are accepted, and on what terms. The administrator's word.
#[derive(Debug, Clone)]
pub struct Issuer {
    /// What the tokens' `iss` must be, byte for byte.
    pub issuer: String,
    /// The key, and with it the only algorithm that is accepted.
    pub key: Key,
    /// What the tokens' `aud` must be or contain.
    pub audience: String,
    /// What the bearers are, unless a token has an `act` claim.
    pub kind: ActorKind,
    /// Seconds by which clocks may differ.
    pub leeway: u32,
}

/// Which rule a token breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenError {
    /// It is longer than [`MAX_TOKEN`].
    TooLong,
    /// It is not three parts of base64url, the first two of them JSON objects.
    Malformed,
    /// It has no `alg`, or an unknown one, or `none`.
    UnknownAlgorithm,
    /// Its header has `crit`: it is not to be accepted by who does not know the extension.
    Critical,
    /// It has no `iss`.
    NoIssuer,
    /// Its `iss` is not that of a known issuer.
    UnknownIssuer,
    /// Its `alg` is not the issuer's.
    Algorithm,
    /// The signature is not one of the issuer's key.
    Signature,
    /// A claim has the wrong type, is too long, or has control characters in it.
    Claim(&'static str),
    /// A required claim is absent or empty.
    Missing(&'static str),
    /// It lists more than [`MAX_GROUPS`] groups.
    Groups,
    /// It is for another audience.
    Audience,
    /// It has expired.
    Expired,
    /// It is not valid yet.
    NotYet,
    /// It was issued in the future.
    Future,
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => return write!(f, "the token is longer than {MAX_TOKEN} bytes"),
            Self::Malformed => "the token is not a signed JSON Web Token",
            Self::UnknownAlgorithm => "the token is not signed by an algorithm that is supported",
            Self::Critical => "the token's header has extensions that are not supported",
            Self::NoIssuer => "the token does not name its issuer",
            Self::UnknownIssuer => "the token's issuer is not known here",
            Self::Algorithm => "the token is not signed by the algorithm of its issuer",
            Self::Signature => "the token's signature is not valid",
            Self::Claim(name) => return write!(f, "the token's claim \"{name}\" is malformed"),
            Self::Missing(name) => return write!(f, "the token has no claim \"{name}\""),
            Self::Groups => return write!(f, "the token lists more than {MAX_GROUPS} groups"),
            Self::Audience => "the token is for another audience",
            Self::Expired => "the token has expired",
            Self::NotYet => "the token is not valid yet",
            Self::Future => "the token was issued in the future",
        })
    }
}

impl TokenError {
    /// What to do about it.
    #[must_use]
    pub fn hint(self) -> &'static str {
        match self {
            Self::TooLong | Self::Groups => "Ask the issuer for a token with fewer claims.",
            Self::Malformed | Self::NoIssuer | Self::Critical => {
                "Pass the access token as the issuer gave it: three parts with dots between them."
            }
            Self::UnknownIssuer => {
                "A member of warden_admin can make the issuer known with warden.add_issuer()."
            }
            Self::UnknownAlgorithm | Self::Algorithm | Self::Signature => {
                "Compare the issuer's algorithm and key with those in warden.issuers."
            }
            Self::Audience => "Ask the issuer for a token for the audience in warden.issuers.",
            Self::Expired => "Get a new token from its issuer and log in again.",
            Self::NotYet | Self::Future => {
                "Compare the clocks of the issuer and of this server, or raise the issuer's leeway."
            }
            Self::Claim(_) | Self::Missing(_) => {
                "The token needs iss, sub, aud and exp; act, groups, nbf, iat and jti are optional."
            }
        }
    }
}

impl std::error::Error for TokenError {}

/// Who a token says that its bearer is, after all checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Who acts. Its trust is [`Trust::Verified`].
    pub actor: Actor,
    /// The `exp` claim: seconds since 1970-01-01 UTC.
    pub expires_at: i64,
    /// When the identity ends: `exp` and the issuer's leeway.
    pub valid_until: i64,
}

/// Claims as they come. Duplicate ones are an error of the deserialiser.
#[derive(Deserialize)]
struct Claims {
    iss: Option<Value>,
    sub: Option<Value>,
    aud: Option<Value>,
    exp: Option<Value>,
    nbf: Option<Value>,
    iat: Option<Value>,
    jti: Option<Value>,
    act: Option<Value>,
    groups: Option<Value>,
}

/// A token that is well formed, and that nobody has verified yet.
pub struct Unverified<'a> {
    message: &'a str,
    signature: &'a str,
    algorithm: Algorithm,
    issuer: String,
    claims: Claims,
}

impl fmt::Debug for Unverified<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unverified").finish_non_exhaustive()
    }
}

impl<'a> Unverified<'a> {
    /// Takes a token apart.
    ///
    /// # Errors
    /// If it is not a signed token in compact form (RFC 7515, section 7.1).
    pub fn parse(token: &'a str) -> Result<Self, TokenError> {
        let token = token.trim_ascii();
        if token.len() > MAX_TOKEN {
            return Err(TokenError::TooLong);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = message.split_once('.').ok_or(TokenError::Malformed)?;
        let header: Map<String, Value> = part(header)?;
        if header.contains_key("crit") {
            return Err(TokenError::Critical);
        }
        let algorithm = header
            .get("alg")
            .and_then(Value::as_str)
            .and_then(Algorithm::parse)
            .ok_or(TokenError::UnknownAlgorithm)?;
        let claims: Claims = part(payload)?;
        let issuer = match &claims.iss {
            None => return Err(TokenError::NoIssuer),
            Some(Value::String(s)) if !s.is_empty() => s.clone(),
            Some(_) => return Err(TokenError::Claim("iss")),
        };
        Ok(Self {
            message,
            signature,
            algorithm,
            issuer,
            claims,
        })
    }

    /// The issuer that the token names: to look the issuer's entry up, and for nothing else.
    #[must_use]
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Checks signature and claims. `now` is in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// The first rule that the token breaks. Nothing is said about the claims of a token whose
    /// signature is not valid.
    pub fn verify(&self, issuer: &Issuer, now: i64) -> Result<Identity, TokenError> {
        if self.issuer != issuer.issuer {
            return Err(TokenError::UnknownIssuer);
        }
        if self.algorithm != issuer.key.algorithm {
            return Err(TokenError::Algorithm);
        }
        let valid = jsonwebtoken::crypto::verify(
            self.signature,
            self.message.as_bytes(),
            &issuer.key.key,
            self.algorithm.jwa(),
        );
        if !matches!(valid, Ok(true)) {
            return Err(TokenError::Signature);
        }
        self.audience(issuer)?;
        let (expires_at, valid_until) = self.times(now, i64::from(issuer.leeway))?;
        Ok(Identity {
            actor: self.actor(issuer)?,
            expires_at,
            valid_until,
        })
    }

    fn audience(&self, issuer: &Issuer) -> Result<(), TokenError> {
        let wanted = |v: &Value| v.as_str() == Some(issuer.audience.as_str());
        let found = match &self.claims.aud {
            None => return Err(TokenError::Missing("aud")),
            Some(v @ Value::String(_)) => wanted(v),
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => {
                list.iter().any(wanted)
            }
            Some(_) => return Err(TokenError::Claim("aud")),
        };
        // An empty audience would match a token that is for nobody.
        if found && !issuer.audience.is_empty() {
            Ok(())
        } else {
            Err(TokenError::Audience)
        }
    }

    fn times(&self, now: i64, leeway: i64) -> Result<(i64, i64), TokenError> {
        let exp = date(&self.claims.exp, "exp")?.ok_or(TokenError::Missing("exp"))?;
        let valid_until = exp.saturating_add(leeway);
        if now >= valid_until {
            return Err(TokenError::Expired);
        }
        let latest = now.saturating_add(leeway);
        if date(&self.claims.nbf, "nbf")?.is_some_and(|t| t > latest) {
            return Err(TokenError::NotYet);
        }
        if date(&self.claims.iat, "iat")?.is_some_and(|t| t > latest) {
            return Err(TokenError::Future);
        }
        Ok((exp, valid_until))
    }

    fn actor(&self, issuer: &Issuer) -> Result<Actor, TokenError> {
        let sub = name(&self.claims.sub, "sub")?.ok_or(TokenError::Missing("sub"))?;
        let (subject, kind, on_behalf_of) = match &self.claims.act {
            None => (sub, issuer.kind, String::new()),
            Some(Value::Object(act)) => {
                let actor =
                    name(&act.get("sub").cloned(), "act")?.ok_or(TokenError::Claim("act"))?;
                (actor, ActorKind::Agent, sub)
            }
            Some(_) => return Err(TokenError::Claim("act")),
        };
        let groups = match &self.claims.groups {
            None => Vec::new(),
            Some(Value::Array(list)) if list.len() > MAX_GROUPS => return Err(TokenError::Groups),
            Some(Value::Array(list)) => list
                .iter()
                .map(|v| {
                    text(v)
                        .map(str::to_owned)
                        .ok_or(TokenError::Claim("groups"))
                })
                .collect::<Result<_, _>>()?,
            Some(v) => vec![text(v).ok_or(TokenError::Claim("groups"))?.to_owned()],
        };
        Ok(Actor {
            subject,
            kind,
            on_behalf_of,
            groups,
            trust: Trust::Verified,
            issuer: issuer.issuer.clone(),
            token_id: name(&self.claims.jti, "jti")?.unwrap_or_default(),
        })
    }
}

/// One part of a token: a JSON object in base64url without padding.
fn part<T: serde::de::DeserializeOwned>(encoded: &str) -> Result<T, TokenError> {
    let bytes = URL_SAFE_NO_PAD
        .decode(encoded)
        .map_err(|_| TokenError::Malformed)?;
    // A sequence would deserialise into a struct too.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(TokenError::Malformed);
    }
    serde_json::from_slice(&bytes).map_err(|_| TokenError::Malformed)
}

/// A NumericDate (RFC 7519, section 2), without its fraction.
fn date(claim: &Option<Value>, name: &'static str) -> Result<Option<i64>, TokenError> {
    let Some(value) = claim else { return Ok(None) };
    match value.as_f64() {
        Some(t) if (0.0..=MAX_DATE).contains(&t) => Ok(Some(t as i64)),
        _ => Err(TokenError::Claim(name)),
    }
}

/// A string that may become a name: not empty, not too long, without control characters.
fn text(value: &Value) -> Option<&str> {
    let s = value.as_str()?;
    let fits = !s.is_empty() && s.chars().count() <= MAX_NAME && !s.chars().any(char::is_control);
    fits.then_some(s)
}

fn name(claim: &Option<Value>, name: &'static str) -> Result<Option<String>, TokenError> {
    match claim {
        None => Ok(None),
        Some(v) => text(v)
            .map(|s| Some(s.to_owned()))
            .ok_or(TokenError::Claim(name)),
    }
}

#[cfg(test)]
#[path = "../../../pgrx-tests/src/jwt.rs"]
#[allow(dead_code, missing_docs, reason = "the integration tests' own helper")]
mod jwt;

#[cfg(test)]
mod tests {
    use super::jwt::{Signer, claims, confused, now, unsigned, with};
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const ISS: &str = "https://idp.example";

    fn issuer(signer: &Signer, algorithm: Algorithm) -> Issuer {
        Issuer {
            issuer: ISS.into(),
            key: Key::parse(algorithm, signer.key()).unwrap(),
            audience: "warden".into(),
            kind: ActorKind::Human,
            leeway: 60,
        }
    }

    fn good() -> Value {
        claims(ISS, "warden", "ana@example.com")
    }

    fn login(issuer: &Issuer, token: &str) -> Result<Identity, TokenError> {
        Unverified::parse(token)?.verify(issuer, now())
    }

    /// What an issuer with ES256 says to claims that differ from good ones.
    fn answer(change: Value) -> Result<Identity, TokenError> {
        let signer = Signer::generate("ES256");
        login(
            &issuer(&signer, Algorithm::Es256),
            &signer.token(&with(good(), change)),
        )
    }

    #[test]
    fn a_good_token_of_each_algorithm_is_accepted_with_pem_and_with_jwk() {
        for algorithm in Algorithm::ALL {
            let signer = Signer::generate(algorithm.name());
            let mut issuer = issuer(&signer, algorithm);
            let token = signer.token(&good());
            let identity = login(&issuer, &token).unwrap();
            assert_eq!(identity.actor.subject, "ana@example.com");
            assert_eq!(identity.actor.kind, ActorKind::Human);
            assert_eq!(identity.actor.trust, Trust::Verified);
            assert_eq!(identity.actor.issuer, ISS);
            assert_eq!(identity.valid_until, identity.expires_at + 60);
            if algorithm != Algorithm::Hs256 {
                issuer.key = Key::parse(algorithm, &signer.jwk().to_string()).unwrap();
                assert_eq!(login(&issuer, &token), Ok(identity), "{}", algorithm.name());
            }
            let stranger = Signer::generate(algorithm.name()).token(&good());
            assert_eq!(login(&issuer, &stranger), Err(TokenError::Signature));
        }
    }

    #[test]
    fn a_token_that_nobody_signed_is_refused() {
        let signer = Signer::generate("ES256");
        let issuer = issuer(&signer, Algorithm::Es256);
        assert_eq!(
            login(&issuer, &unsigned(&good())),
            Err(TokenError::UnknownAlgorithm)
        );
        for alg in [
            json!("None"),
            json!("es256"),
            json!("HS512"),
            json!(""),
            json!(7),
            json!(null),
        ] {
            let token = signer.token_with_header(&json!({"alg": alg}), &good());
            assert_eq!(
                login(&issuer, &token),
                Err(TokenError::UnknownAlgorithm),
                "{alg}"
            );
        }
        let token = signer.token(&good());
        let (message, _) = token.rsplit_once('.').unwrap();
        assert_eq!(
            login(&issuer, &format!("{message}.")),
            Err(TokenError::Signature)
        );
        assert_eq!(
            login(&issuer, &format!("{message}.AAAA")),
            Err(TokenError::Signature)
        );
        assert_eq!(
            login(&issuer, &format!("{message}.!!")),
            Err(TokenError::Signature)
        );
    }

    #[test]
    fn a_public_key_is_never_an_hmac_secret() {
        for algorithm in [Algorithm::Rs256, Algorithm::Es256, Algorithm::EdDsa] {
            let signer = Signer::generate(algorithm.name());
            let token = confused(signer.key(), &good());
            assert_eq!(
                login(&issuer(&signer, algorithm), &token),
                Err(TokenError::Algorithm)
            );
            let as_secret = |key: &str| Key::parse(Algorithm::Hs256, key).unwrap_err();
            assert_eq!(as_secret(signer.key()), KeyError::NotASecret);
            assert_eq!(as_secret(&signer.jwk().to_string()), KeyError::NotASecret);
        }
    }

    #[test]
    fn another_algorithm_of_the_same_key_is_refused() {
        let signer = Signer::generate("RS256");
        let issuer = issuer(&signer, Algorithm::Rs256);
        for alg in ["RS384", "RS512", "PS256"] {
            let token = signer.token_with_header(&json!({"alg": alg}), &good());
            assert_eq!(login(&issuer, &token), Err(TokenError::Algorithm));
        }
    }

    #[test]
    fn a_changed_claim_breaks_the_signature() {
        let signer = Signer::generate("EdDSA");
        let issuer = issuer(&signer, Algorithm::EdDsa);
        let token = signer.token(&good());
        let other = signer.token(&with(good(), json!({"sub": "root"})));
        let (head, rest) = token.split_once('.').unwrap();
        let signature = rest.split_once('.').unwrap().1;
        let payload = other.split('.').nth(1).unwrap();
        let forged = format!("{head}.{payload}.{signature}");
        assert_eq!(login(&issuer, &forged), Err(TokenError::Signature));
    }

    #[test]
    fn a_header_with_critical_extensions_is_refused() {
        let signer = Signer::generate("ES256");
        for crit in [json!(["b64"]), json!([]), json!(null)] {
            let token = signer.token_with_header(&json!({"alg": "ES256", "crit": crit}), &good());
            let answer = login(&issuer(&signer, Algorithm::Es256), &token);
            assert_eq!(answer, Err(TokenError::Critical));
        }
    }

    #[test]
    fn another_issuer_is_refused() {
        assert_eq!(
            answer(json!({"iss": "https://idp.example/"})),
            Err(TokenError::UnknownIssuer)
        );
        assert_eq!(answer(json!({"iss": null})), Err(TokenError::NoIssuer));
        assert_eq!(answer(json!({"iss": [ISS]})), Err(TokenError::Claim("iss")));
        assert_eq!(answer(json!({"iss": ""})), Err(TokenError::Claim("iss")));
    }

    #[test]
    fn another_audience_is_refused() {
        assert!(answer(json!({"aud": ["other", "warden"]})).is_ok());
        for aud in [
            json!("other"),
            json!("Warden"),
            json!("warden "),
            json!([]),
            json!(""),
        ] {
            assert_eq!(
                answer(json!({"aud": aud})),
                Err(TokenError::Audience),
                "{aud}"
            );
        }
        assert_eq!(
            answer(json!({"aud": null})),
            Err(TokenError::Missing("aud"))
        );
        assert_eq!(
            answer(json!({"aud": {"warden": 1}})),
            Err(TokenError::Claim("aud"))
        );
        assert_eq!(
            answer(json!({"aud": ["warden", 1]})),
            Err(TokenError::Claim("aud"))
        );
    }

    #[test]
    fn time_bounds_hold_within_the_leeway() {
        let now = now();
        assert!(answer(json!({"exp": now - 50})).is_ok());
        assert_eq!(answer(json!({"exp": now - 61})), Err(TokenError::Expired));
        assert!(answer(json!({"exp": f64::from(now as u32) + 100.5})).is_ok());
        assert_eq!(
            answer(json!({"exp": null})),
            Err(TokenError::Missing("exp"))
        );
        assert_eq!(
            answer(json!({"exp": "soon"})),
            Err(TokenError::Claim("exp"))
        );
        assert_eq!(answer(json!({"exp": -1})), Err(TokenError::Claim("exp")));
        assert_eq!(
            answer(json!({"exp": now * 1000})),
            Err(TokenError::Claim("exp"))
        );
        assert_eq!(answer(json!({"exp": 1e300})), Err(TokenError::Claim("exp")));
        assert!(answer(json!({"nbf": now + 50})).is_ok());
        assert_eq!(answer(json!({"nbf": now + 90})), Err(TokenError::NotYet));
        assert_eq!(answer(json!({"nbf": []})), Err(TokenError::Claim("nbf")));
        assert!(answer(json!({"iat": now + 50})).is_ok());
        assert_eq!(answer(json!({"iat": now + 90})), Err(TokenError::Future));
        assert_eq!(answer(json!({"iat": true})), Err(TokenError::Claim("iat")));
    }

    #[test]
    fn a_subject_is_a_short_printable_string() {
        assert_eq!(
            answer(json!({"sub": null})),
            Err(TokenError::Missing("sub"))
        );
        let long = "x".repeat(MAX_NAME + 1);
        for sub in [
            json!(""),
            json!(7),
            json!(["ana"]),
            json!("a\u{0}b"),
            json!("a\nb"),
            json!(long),
        ] {
            assert_eq!(
                answer(json!({"sub": sub})),
                Err(TokenError::Claim("sub")),
                "{sub}"
            );
        }
        assert_eq!(answer(json!({"jti": 7})), Err(TokenError::Claim("jti")));
        assert_eq!(answer(json!({"jti": "t-1"})).unwrap().actor.token_id, "t-1");
    }

    #[test]
    fn the_outermost_actor_acts_on_behalf_of_the_subject() {
        let act = json!({"act": {"sub": "agent-2", "act": {"sub": "agent-1"}}});
        let actor = answer(act).unwrap().actor;
        assert_eq!(actor.subject, "agent-2");
        assert_eq!(actor.kind, ActorKind::Agent);
        assert_eq!(actor.on_behalf_of, "ana@example.com");
        for act in [
            json!("agent"),
            json!({}),
            json!({"sub": ""}),
            json!({"sub": 1}),
            json!([]),
        ] {
            assert_eq!(
                answer(json!({"act": act})),
                Err(TokenError::Claim("act")),
                "{act}"
            );
        }
    }

    #[test]
    fn groups_are_bounded() {
        let groups = |v: Value| answer(json!({"groups": v})).map(|i| i.actor.groups);
        assert_eq!(
            groups(json!(["a", "b"])),
            Ok(vec!["a".to_owned(), "b".to_owned()])
        );
        assert_eq!(groups(json!("a")), Ok(vec!["a".to_owned()]));
        assert_eq!(groups(json!([])), Ok(vec![]));
        assert_eq!(
            groups(json!(vec!["g"; MAX_GROUPS])).unwrap().len(),
            MAX_GROUPS
        );
        assert_eq!(
            groups(json!(vec!["g"; MAX_GROUPS + 1])),
            Err(TokenError::Groups)
        );
        for bad in [
            json!([1]),
            json!({"a": 1}),
            json!(["x".repeat(MAX_NAME + 1)]),
            json!([""]),
        ] {
            assert_eq!(
                groups(bad.clone()),
                Err(TokenError::Claim("groups")),
                "{bad}"
            );
        }
    }

    #[test]
    fn the_kind_is_the_issuers_word() {
        let signer = Signer::generate("HS256");
        let mut issuer = issuer(&signer, Algorithm::Hs256);
        issuer.kind = ActorKind::Service;
        let token = signer.token(&with(good(), json!({"kind": "human"})));
        assert_eq!(
            login(&issuer, &token).unwrap().actor.kind,
            ActorKind::Service
        );
    }

    #[test]
    fn what_is_not_a_compact_token_is_refused() {
        let signer = Signer::generate("HS256");
        let issuer = issuer(&signer, Algorithm::Hs256);
        let token = signer.token(&good());
        assert!(login(&issuer, &format!(" {token}\n")).is_ok());
        for bad in [
            "",
            ".",
            "..",
            "a.b.c",
            "Bearer x",
            &format!("{token}.x"),
            &token.replace('.', ".."),
            &token[1..],
            &format!("{token}="),
            &format!(
                "{}.{}",
                URL_SAFE_NO_PAD.encode("[\"HS256\"]"),
                token.split_once('.').unwrap().1
            ),
        ] {
            let answer = login(&issuer, bad);
            assert!(
                matches!(answer, Err(TokenError::Malformed | TokenError::Signature)),
                "{bad} {answer:?}"
            );
        }
        let twice = URL_SAFE_NO_PAD.encode(format!(r#"{{"iss":"{ISS}","iss":"x","sub":"a"}}"#));
        let (head, _) = token.split_once('.').unwrap();
        assert_eq!(
            login(&issuer, &format!("{head}.{twice}.AA")),
            Err(TokenError::Malformed)
        );
        let long = signer.token(&with(good(), json!({"x": "y".repeat(MAX_TOKEN)})));
        assert_eq!(login(&issuer, &long), Err(TokenError::TooLong));
    }

    #[test]
    fn a_key_that_does_not_fit_its_algorithm_is_refused() {
        let p256 = Signer::generate("ES256");
        let p384 = Signer::generate("ES384");
        let ed = Signer::generate("EdDSA");
        let rsa = Signer::generate("RS256");
        for (algorithm, others) in [
            (Algorithm::Es256, [&p384, &ed, &rsa]),
            (Algorithm::Es384, [&p256, &ed, &rsa]),
            (Algorithm::EdDsa, [&p256, &p384, &rsa]),
            (Algorithm::Rs256, [&p256, &p384, &ed]),
            (Algorithm::Ps256, [&p256, &p384, &ed]),
        ] {
            for other in others {
                let kind = KeyError::Kind(algorithm);
                assert_eq!(Key::parse(algorithm, other.key()).unwrap_err(), kind);
                assert_eq!(
                    Key::parse(algorithm, &other.jwk().to_string()).unwrap_err(),
                    kind
                );
            }
        }
        let refused = |a, text: &str| Key::parse(a, text).unwrap_err();
        assert_eq!(
            refused(Algorithm::Hs256, &"x".repeat(31)),
            KeyError::ShortSecret
        );
        assert_eq!(refused(Algorithm::Rs256, "secret"), KeyError::Format);
        assert_eq!(
            refused(Algorithm::Rs256, "{}"),
            KeyError::Kind(Algorithm::Rs256)
        );
        assert_eq!(
            refused(Algorithm::Rs256, "-----BEGIN PUBLIC KEY-----"),
            KeyError::Format
        );
        let private = p256.key().replace("PUBLIC KEY", "PRIVATE KEY");
        assert_eq!(refused(Algorithm::Es256, &private), KeyError::PrivateKey);
        let private = with(p256.jwk().clone(), json!({"d": "AAAA"})).to_string();
        assert_eq!(refused(Algorithm::Es256, &private), KeyError::PrivateKey);
        let certificate = p256.key().replace("PUBLIC KEY", "CERTIFICATE");
        assert_eq!(refused(Algorithm::Es256, &certificate), KeyError::PemLabel);
        for other in [json!({"alg": "RS512"}), json!({"use": "enc"})] {
            let jwk = with(rsa.jwk().clone(), other).to_string();
            assert_eq!(refused(Algorithm::Rs256, &jwk), KeyError::JwkAlgorithm);
        }
        let off_curve = with(p256.jwk().clone(), json!({"y": p256.jwk()["x"]})).to_string();
        assert_eq!(
            refused(Algorithm::Es256, &off_curve),
            KeyError::Kind(Algorithm::Es256)
        );
        let short = json!({"kty": "RSA", "e": "AQAB", "n": URL_SAFE_NO_PAD.encode([0xc1u8; 128])});
        assert_eq!(
            refused(Algorithm::Rs256, &short.to_string()),
            KeyError::Kind(Algorithm::Rs256)
        );
    }

    #[test]
    fn no_message_holds_any_part_of_a_token() {
        let e = answer(json!({"sub": "SECRET\n", "iss": ISS})).unwrap_err();
        assert!(!format!("{e} {e:?} {}", e.hint()).contains("SECRET"));
        let signer = Signer::generate("HS256");
        let key = Key::parse(Algorithm::Hs256, signer.key()).unwrap();
        assert!(!format!("{key:?}").contains(signer.key()));
        let token = signer.token(&good());
        assert!(!format!("{:?}", Unverified::parse(&token).unwrap()).contains("ana"));
    }

    proptest! {
        #[test]
        fn no_input_panics(token in ".{0,200}", a in any::<Vec<u8>>(), b in any::<Vec<u8>>()) {
            let _ = Unverified::parse(&token).map(|t| t.issuer().len());
            let parts = [&a, &b, &a].map(|p| URL_SAFE_NO_PAD.encode(p));
            let _ = Unverified::parse(&parts.join(".")).map(|t| t.issuer().len());
            for algorithm in Algorithm::ALL {
                let _ = Key::parse(algorithm, &token);
                let _ = Key::parse(algorithm, &String::from_utf8_lossy(&a));
            }
        }

        #[test]
        fn no_claims_panic(json in "\\PC{0,30}", n in any::<f64>(), i in any::<i64>(), leeway: u32, now: i64) {
            let signer = hmac_signer();
            let mut issuer = issuer(signer, Algorithm::Hs256);
            issuer.leeway = leeway;
            for change in [json!({"exp": n}), json!({"exp": i}), json!({"nbf": n, "iat": i}),
                           json!({"sub": json, "act": {"sub": json}, "groups": [json, n]})] {
                let token = signer.token(&with(good(), change));
                if let Ok(t) = Unverified::parse(&token) {
                    let _ = t.verify(&issuer, now);
                }
            }
        }
    }

    fn hmac_signer() -> &'static Signer {
        static SIGNER: std::sync::OnceLock<Signer> = std::sync::OnceLock::new();
        SIGNER.get_or_init(|| Signer::generate("HS256"))
    }
}
