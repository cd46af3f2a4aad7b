//! Mints JSON Web Tokens for tests, good ones and bad ones. Keys are made when a test runs.
//!
//! ```ignore
//! let idp = jwt::Signer::generate("ES256");
//! // SELECT warden.add_issuer('https://idp.example', 'ES256', $1 /* idp.key() */, 'warden', 'human')
//! let token = idp.token(&jwt::claims("https://idp.example", "warden", "ana@example.com"));
//! // SELECT warden.login($1 /* token */)
//! let agent = idp.token(&jwt::with(
//!     jwt::claims("https://idp.example", "warden", "ana@example.com"),
//!     json!({"act": {"sub": "agent-1"}, "groups": ["support"]}),
//! ));
//! ```

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    self as aws, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaEncoding, RsaKeyPair,
    RsaPublicKeyComponents,
};
use aws_lc_rs::{hmac, rand};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

enum Private {
    Hmac(Box<hmac::Key>),
    Rsa(Box<RsaKeyPair>, &'static dyn RsaEncoding),
    Ecdsa(Box<EcdsaKeyPair>),
    Ed(Ed25519KeyPair),
}

/// A key pair, or a secret, and the algorithm that it is for.
pub struct Signer {
    algorithm: &'static str,
    private: Private,
    key: String,
    jwk: Value,
}

impl Signer {
    /// Makes a key for `HS256`, `RS256`, `RS384`, `RS512`, `PS256`, `ES256`, `ES384` or `EdDSA`.
    pub fn generate(algorithm: &'static str) -> Self {
        let b64 = |b: &[u8]| URL_SAFE_NO_PAD.encode(b);
        let (private, key, jwk) = match algorithm {
            "HS256" => {
                let mut bytes = [0u8; 32];
                rand::fill(&mut bytes).expect("randomness");
                let secret = b64(&bytes);
                let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
                let jwk = json!({"kty": "oct", "k": b64(secret.as_bytes())});
                (Private::Hmac(Box::new(key)), secret, jwk)
            }
            "ES256" | "ES384" => {
                let (a, curve) = if algorithm == "ES256" {
                    (&aws::ECDSA_P256_SHA256_FIXED_SIGNING, "P-256")
                } else {
                    (&aws::ECDSA_P384_SHA384_FIXED_SIGNING, "P-384")
                };
                let pair = EcdsaKeyPair::generate(a).expect("an EC key");
                let point = &pair.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                let jwk = json!({"kty": "EC", "crv": curve, "x": b64(x), "y": b64(y)});
                let key = public_pem(pair.public_key().as_der().expect("DER").as_ref());
                (Private::Ecdsa(Box::new(pair)), key, jwk)
            }
            "EdDSA" => {
                let pair = Ed25519KeyPair::generate().expect("an Ed25519 key");
                let x = b64(pair.public_key().as_ref());
                let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": x});
                let key = public_pem(pair.public_key().as_der().expect("DER").as_ref());
                (Private::Ed(pair), key, jwk)
            }
            _ => {
                let encoding: &'static dyn RsaEncoding = match algorithm {
                    "RS256" => &aws::RSA_PKCS1_SHA256,
                    "RS384" => &aws::RSA_PKCS1_SHA384,
                    "RS512" => &aws::RSA_PKCS1_SHA512,
                    "PS256" => &aws::RSA_PSS_SHA256,
                    other => panic!("no such algorithm: {other}"),
                };
                let pair = RsaKeyPair::generate(KeySize::Rsa2048).expect("an RSA key");
                let parts = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
                let jwk = json!({"kty": "RSA", "n": b64(&parts.n), "e": b64(&parts.e)});
                let key = public_pem(pair.public_key().as_der().expect("DER").as_ref());
                (Private::Rsa(Box::new(pair), encoding), key, jwk)
            }
        };
        Self {
            algorithm,
            private,
            key,
            jwk,
        }
    }

    /// What `warden.add_issuer` takes: the secret, or the public key in PEM.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The public key as a JWK.
    pub fn jwk(&self) -> &Value {
        &self.jwk
    }

    /// A signed token.
    pub fn token(&self, claims: &Value) -> String {
        self.token_with_header(&json!({"alg": self.algorithm, "typ": "JWT"}), claims)
    }

    /// A signed token whose header says what you like.
    pub fn token_with_header(&self, header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", part(header), part(claims));
        format!(
            "{message}.{}",
            URL_SAFE_NO_PAD.encode(self.sign(message.as_bytes()))
        )
    }

    /// The raw signature of a message.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.private {
            Private::Hmac(key) => hmac::sign(key, message).as_ref().to_vec(),
            Private::Ecdsa(pair) => pair
                .sign(&random, message)
                .expect("a signature")
                .as_ref()
                .to_vec(),
            Private::Ed(pair) => pair.sign(message).as_ref().to_vec(),
            Private::Rsa(pair, encoding) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(*encoding, &random, message, &mut signature)
                    .expect("a signature");
                signature
            }
        }
    }
}

/// A token that nobody signed: `alg` is `none`.
pub fn unsigned(claims: &Value) -> String {
    format!("{}.{}.", part(&json!({"alg": "none"})), part(claims))
}

/// A token signed with HS256 whose secret is the given text: a public key, say.
pub fn confused(secret: &str, claims: &Value) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let message = format!("{}.{}", part(&json!({"alg": "HS256"})), part(claims));
    let signature = hmac::sign(&key, message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
}

/// Claims that are valid for an hour.
pub fn claims(issuer: &str, audience: &str, subject: &str) -> Value {
    let now = now();
    json!({"iss": issuer, "aud": audience, "sub": subject, "iat": now, "exp": now + 3600})
}

/// Claims that expired an hour ago.
pub fn expired(issuer: &str, audience: &str, subject: &str) -> Value {
    let now = now();
    with(
        claims(issuer, audience, subject),
        json!({"iat": now - 7200, "exp": now - 3600}),
    )
}

/// The claims with others added or replaced; `null` removes one.
pub fn with(mut claims: Value, others: Value) -> Value {
    let map = claims.as_object_mut().expect("claims are an object");
    for (name, value) in others.as_object().expect("claims are an object") {
        if value.is_null() {
            map.remove(name);
        } else {
            map.insert(name.clone(), value.clone());
        }
    }
    claims
}

/// Seconds since 1970-01-01 UTC.
pub fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock after 1970");
    since.as_secs() as i64
}

fn part(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn public_pem(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("PUBLIC KEY", der))
}
