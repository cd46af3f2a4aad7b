//! Who acts, by a token that the server checked.

use serde_json::{Value, json};
use warden_tests::jwt::{self, Signer};
use warden_tests::{Client, Cluster, Result};

const ISSUER: &str = "https://idp.example";
const AUDIENCE: &str = "shop-db";

async fn add_issuer(cluster: &Cluster, issuer: &str, algorithm: &str, key: &str) -> Result {
    let dba = cluster.connect("dba", "postgres").await?;
    dba.query(
        "SELECT warden.add_issuer($1, $2, $3, $4)",
        &[&issuer, &algorithm, &key, &AUDIENCE],
    )
    .await?;
    Ok(())
}

/// A cluster that accepts tokens of one signer, and a session of `app`.
async fn accepting(algorithm: &'static str) -> Result<(Cluster, Signer, Client)> {
    let cluster = Cluster::with_warden().await?;
    let signer = Signer::generate(algorithm);
    add_issuer(&cluster, ISSUER, algorithm, signer.key()).await?;
    let app = cluster.connect("app", "postgres").await?;
    Ok((cluster, signer, app))
}

async fn login(client: &Client, token: &str) -> Result<String> {
    Ok(client
        .query_one("SELECT warden.login($1)", &[&token])
        .await?
        .get(0))
}

/// The SQLSTATE and the whole text of a refused login.
async fn refused(client: &Client, token: &str) -> (String, String) {
    match client.query_one("SELECT warden.login($1)", &[&token]).await {
        Ok(row) => ("00000".into(), row.get(0)),
        Err(e) => (
            e.code().map(|c| c.code().to_owned()).unwrap_or_default(),
            format!("{e:?}"),
        ),
    }
}

fn claims() -> Value {
    jwt::claims(ISSUER, AUDIENCE, "ana@example.com")
}

async fn whoami(client: &Client) -> Result<Value> {
    Ok(client
        .objects("SELECT * FROM warden.whoami()")
        .await?
        .swap_remove(0))
}

#[tokio::test]
async fn tokens_of_every_algorithm_are_accepted() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    for algorithm in [
        "HS256", "RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA",
    ] {
        let signer = Signer::generate(algorithm);
        let issuer = format!("{ISSUER}/{algorithm}");
        add_issuer(&cluster, &issuer, algorithm, signer.key()).await?;
        let token = signer.token(&jwt::claims(&issuer, AUDIENCE, algorithm));
        assert_eq!(login(&app, &token).await?, algorithm);
    }
    Ok(())
}

#[tokio::test]
async fn a_token_becomes_the_actor_of_what_follows() -> Result {
    let (cluster, signer, app) = accepting("ES256").await?;
    let token = signer.token(&jwt::with(
        claims(),
        json!({"act": {"sub": "agent-7"}, "groups": ["support", "eu"], "jti": "t-1"}),
    ));
    app.run("SELECT 1 AS before_login").await?;
    login(&app, &token).await?;
    app.run("SELECT 1 AS while_logged_in").await?;
    let me = whoami(&app).await?;
    assert_eq!(me["actor"], "agent-7", "{me}");
    assert_eq!(me["on_behalf_of"], "ana@example.com");
    assert_eq!(me["actor_groups"], json!(["support", "eu"]));
    app.run("SELECT warden.logout()").await?;
    app.run("SELECT 1 AS after_logout").await?;
    let seen = cluster
        .activity("query ~ 'AS (before_login|while_logged_in|after_logout)$'")
        .await?;
    let who: Vec<_> = seen
        .iter()
        .map(|a| (a["actor"].clone(), a["trust"].clone()))
        .collect();
    let expected = [("app", "role"), ("agent-7", "verified"), ("app", "role")];
    assert_eq!(who, expected.map(|(a, t)| (json!(a), json!(t))));
    assert_eq!(seen[1]["on_behalf_of"], "ana@example.com");
    assert_eq!(seen[1]["actor_kind"], "agent");
    Ok(())
}

#[tokio::test]
async fn bad_tokens_are_refused_and_recorded() -> Result {
    let (cluster, signer, app) = accepting("RS256").await?;
    let other = Signer::generate("RS256");
    let good = signer.token(&claims());
    let (head, signature) = good.rsplit_once('.').unwrap_or_default();
    let tampered = {
        let parts: Vec<_> = good.split('.').collect();
        let mallory = signer.token(&jwt::with(claims(), json!({"sub": "mallory"})));
        let body = mallory.split('.').nth(1).unwrap_or_default();
        format!("{}.{body}.{}", parts[0], parts[2])
    };
    let bad = [
        (
            "expired",
            signer.token(&jwt::expired(ISSUER, AUDIENCE, "ana")),
        ),
        ("signed by another key", other.token(&claims())),
        ("alg none", jwt::unsigned(&claims())),
        (
            "alg none, with a signature",
            format!("{}{signature}", jwt::unsigned(&claims())),
        ),
        (
            "public key as HS256 secret",
            jwt::confused(signer.key(), &claims()),
        ),
        (
            "wrong audience",
            signer.token(&jwt::claims(ISSUER, "other-db", "ana")),
        ),
        (
            "no audience",
            signer.token(&jwt::with(claims(), json!({"aud": null}))),
        ),
        (
            "wrong issuer",
            signer.token(&jwt::claims("https://evil.example", AUDIENCE, "ana")),
        ),
        (
            "no issuer",
            signer.token(&jwt::with(claims(), json!({"iss": null}))),
        ),
        (
            "no expiry",
            signer.token(&jwt::with(claims(), json!({"exp": null}))),
        ),
        (
            "no subject",
            signer.token(&jwt::with(claims(), json!({"sub": null}))),
        ),
        (
            "empty subject",
            signer.token(&jwt::with(claims(), json!({"sub": ""}))),
        ),
        (
            "not yet valid",
            signer.token(&jwt::with(claims(), json!({"nbf": jwt::now() + 3600}))),
        ),
        ("other claims under the signature", tampered),
        ("no signature", format!("{head}.")),
        ("two parts", head.to_owned()),
        ("not a token", "hello".into()),
        ("nothing", String::new()),
        ("a very long one", "x".repeat(1 << 20)),
    ];
    for (what, token) in &bad {
        let (sqlstate, text) = refused(&app, token).await;
        assert_eq!(sqlstate, "WA003", "{what}: {text}");
        assert!(
            token.len() < 20 || !text.contains(token.as_str()),
            "{what} is shown: {text}"
        );
        assert_eq!(whoami(&app).await?["trust"], "role", "{what}");
    }
    let seen = cluster.activity("sqlstate = 'WA003'").await?;
    assert_eq!(seen.len(), bad.len());
    assert_eq!(login(&app, &good).await?, "ana@example.com");
    Ok(())
}

#[tokio::test]
async fn a_refused_token_takes_the_former_identity_away() -> Result {
    let (_cluster, signer, app) = accepting("HS256").await?;
    login(&app, &signer.token(&claims())).await?;
    assert_eq!(refused(&app, "no.such.token").await.0, "WA003");
    assert_eq!(whoami(&app).await?["trust"], "role");
    Ok(())
}

#[tokio::test]
async fn no_token_and_no_key_reaches_ledger_log_or_journal() -> Result {
    let (cluster, signer, app) = accepting("HS256").await?;
    let token = signer.token(&claims());
    // As a literal, as a parameter, in a prepared statement, in a block, in a failing statement.
    app.run(&format!("SELECT warden.login('{token}')")).await?;
    login(&app, &token).await?;
    app.run(&format!(
        "PREPARE p (text) AS SELECT warden.login($1); EXECUTE p ('{token}')"
    ))
    .await?;
    app.run(&format!(
        "DO $$ BEGIN PERFORM warden.login('{token}'); END $$"
    ))
    .await?;
    app.error(&format!(
        "SELECT warden.login('{token}'), 1 / (random() * 0)::int"
    ))
    .await?;
    app.error(&format!("SELECT warden.login('{token}x')"))
        .await?;
    cluster.drained().await?;
    let signature = token.rsplit('.').next().unwrap_or_default().to_owned();
    let su = cluster.superuser().await?;
    for secret in [signature.as_str(), signer.key()] {
        let sql = format!(
            "SELECT count(*) FROM warden.event
             WHERE position(convert_to('{secret}', 'UTF8') IN payload) > 0"
        );
        assert_eq!(su.number(&sql).await?, 0, "in the ledger");
        for file in std::fs::read_dir(cluster.data().join("pg_warden"))? {
            let path = file?.path();
            if path.is_file() {
                let bytes = std::fs::read(&path)?;
                let found = bytes.windows(secret.len()).any(|w| w == secret.as_bytes());
                assert!(!found, "in {}", path.display());
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn keys_of_issuers_are_shown_to_nobody() -> Result {
    let (cluster, signer, _) = accepting("HS256").await?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE keeper LOGIN IN ROLE warden_admin")
        .await?;
    let keeper = cluster.connect("keeper", "postgres").await?;
    let shown = keeper.objects("SELECT * FROM warden.issuers").await?;
    assert_eq!(shown.len(), 1);
    assert!(!shown[0].to_string().contains(signer.key()), "{shown:?}");
    assert_eq!(
        keeper.sqlstate("SELECT * FROM warden.issuer").await?,
        "42501"
    );
    Ok(())
}

#[tokio::test]
async fn an_identity_cannot_be_set_by_a_setting() -> Result {
    let (cluster, _signer, app) = accepting("HS256").await?;
    for setting in [
        "request.jwt.claims",
        "warden.actor",
        "warden.identity",
        "role.actor",
    ] {
        app.run(&format!("SET {setting} = '{{\"sub\": \"mallory\"}}'"))
            .await
            .ok();
    }
    app.run("SELECT 1 AS with_forged_settings").await?;
    let seen = cluster
        .the_activity("query LIKE '%AS with_forged_settings'")
        .await?;
    assert_eq!(
        (&seen["actor"], &seen["trust"]),
        (&json!("app"), &json!("role"))
    );
    Ok(())
}

#[tokio::test]
async fn a_dropped_issuer_is_believed_no_more() -> Result {
    let (cluster, signer, app) = accepting("ES256").await?;
    let token = signer.token(&claims());
    login(&app, &token).await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(&format!("SELECT warden.drop_issuer('{ISSUER}')"))
        .await?;
    assert_eq!(refused(&app, &token).await.0, "WA003");
    Ok(())
}

#[tokio::test]
async fn an_agent_that_logs_out_is_still_held_to_be_one() -> Result {
    let (_cluster, signer, app) = accepting("ES256").await?;
    login(
        &app,
        &signer.token(&jwt::with(claims(), json!({"act": {"sub": "agent-7"}}))),
    )
    .await?;
    app.run("SELECT warden.logout()").await?;
    let me = whoami(&app).await?;
    assert_eq!(me["agent"], true, "{me}");
    Ok(())
}
