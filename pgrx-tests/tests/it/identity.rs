//! Who acts: tokens that are accepted, and all those that are not.

use serde_json::{Value, json};
use warden_tests::jwt::{self, Signer};
use warden_tests::{Client, Cluster, Result};

const ISSUER: &str = "https://idp.example";
const AUDIENCE: &str = "shop";

fn claims() -> Value {
    jwt::claims(ISSUER, AUDIENCE, "ana@example.com")
}

/// A cluster that accepts tokens of one issuer.
async fn trusting(signer: &Signer, algorithm: &str) -> Result<(Cluster, Client)> {
    let cluster = Cluster::with_warden().await?;
    cluster
        .superuser()
        .await?
        .run(&format!(
            "SELECT warden.add_issuer('{ISSUER}', '{algorithm}', $key${}$key$, '{AUDIENCE}')",
            signer.key()
        ))
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    Ok((cluster, app))
}

fn login(token: &str) -> String {
    format!("SELECT warden.login('{token}')")
}

async fn accepted(algorithm: &'static str) -> Result {
    let signer = Signer::generate(algorithm);
    let (cluster, app) = trusting(&signer, algorithm).await?;
    let token = signer.token(&jwt::with(
        claims(),
        json!({"groups": ["support"], "act": {"sub": "copilot-7"}}),
    ));
    assert_eq!(app.value(&login(&token)).await?, "copilot-7");
    app.run("SELECT 1 AS done_by_the_agent").await?;
    app.run("SELECT warden.logout()").await?;
    app.run("SELECT 1 AS done_after_logout").await?;
    cluster.drained().await?;
    let event = cluster
        .the_activity("query LIKE '%done_by_the_agent'")
        .await?;
    assert_eq!(event["actor"], "copilot-7");
    assert_eq!(event["actor_kind"], "agent");
    assert_eq!(event["on_behalf_of"], "ana@example.com");
    assert_eq!(event["trust"], "verified");
    assert_eq!(event["login_role"], "app");
    let event = cluster
        .the_activity("query LIKE '%done_after_logout'")
        .await?;
    assert_eq!(event["actor"], "app");
    assert_eq!(event["trust"], "role");
    assert_eq!(
        event["actor_kind"], "agent",
        "once an agent's, a session stays one"
    );
    Ok(())
}

#[tokio::test]
async fn a_token_signed_with_hs256_is_an_identity() -> Result {
    accepted("HS256").await
}

#[tokio::test]
async fn a_token_signed_with_rs256_is_an_identity() -> Result {
    accepted("RS256").await
}

#[tokio::test]
async fn a_token_signed_with_es256_is_an_identity() -> Result {
    accepted("ES256").await
}

#[tokio::test]
async fn a_bad_token_is_refused_and_takes_the_former_identity_away() -> Result {
    let signer = Signer::generate("RS256");
    let (cluster, app) = trusting(&signer, "RS256").await?;
    let good = signer.token(&claims());
    let other = Signer::generate("RS256");
    let mut tampered = good.clone().into_bytes();
    let middle = good.find('.').expect("a token has dots") + 10;
    tampered[middle] = if tampered[middle] == b'A' { b'B' } else { b'A' };
    let bad = [
        ("unsigned", jwt::unsigned(&claims())),
        ("confused", jwt::confused(signer.key(), &claims())),
        ("other key", other.token(&claims())),
        (
            "expired",
            signer.token(&jwt::expired(ISSUER, AUDIENCE, "ana@example.com")),
        ),
        (
            "audience",
            signer.token(&jwt::claims(ISSUER, "elsewhere", "ana@example.com")),
        ),
        (
            "issuer",
            signer.token(&jwt::claims("https://evil.example", AUDIENCE, "ana")),
        ),
        (
            "no exp",
            signer.token(&jwt::with(claims(), json!({"exp": null}))),
        ),
        (
            "no sub",
            signer.token(&jwt::with(claims(), json!({"sub": null}))),
        ),
        (
            "not yet",
            signer.token(&jwt::with(claims(), json!({"nbf": jwt::now() + 3600}))),
        ),
        ("tampered", String::from_utf8(tampered)?),
        ("empty", String::new()),
        ("noise", "a.b.c".into()),
    ];
    for (what, token) in &bad {
        app.value(&login(&good)).await?;
        let error = app.error(&login(token)).await?;
        assert_eq!(error.code().code(), "WA003", "{what}: {error:?}");
        assert!(error.hint().is_some(), "{what}: {error:?}");
        if token.len() > 20 {
            assert!(!format!("{error:?}").contains(token.as_str()), "{what}");
        }
        let trust = app.value("SELECT trust FROM warden.whoami()").await?;
        assert_eq!(trust, "role", "{what}");
    }
    cluster.drained().await?;
    let refused = cluster
        .activity("sqlstate = 'WA003' AND query LIKE 'SELECT warden.login(%'")
        .await?;
    assert_eq!(refused.len(), bad.len());
    Ok(())
}

#[tokio::test]
async fn a_token_is_in_no_record() -> Result {
    let signer = Signer::generate("HS256");
    let (cluster, app) = trusting(&signer, "HS256").await?;
    let token = signer.token(&claims());
    app.value(&login(&token)).await?;
    app.error(&login(&signer.token(&jwt::expired(ISSUER, AUDIENCE, "x"))))
        .await?;
    cluster.drained().await?;
    let admin = cluster.superuser().await?;
    let found = admin
        .number(
            "SELECT count(*) FROM warden.statement s
             WHERE s::text LIKE '%eyJ%' OR s::text LIKE '%' || (SELECT secret FROM warden.issuer_secret) || '%'",
        )
        .await?;
    assert_eq!(found, 0);
    let payloads = admin
        .number("SELECT count(*) FROM warden.event WHERE payload::text LIKE '%' || encode('eyJ', 'hex') || '%'")
        .await?;
    assert_eq!(payloads, 0);
    Ok(())
}

#[tokio::test]
async fn keys_are_nobodys_to_read() -> Result {
    let signer = Signer::generate("HS256");
    let (cluster, app) = trusting(&signer, "HS256").await?;
    cluster
        .superuser()
        .await?
        .run("GRANT warden_admin, warden_auditor TO app")
        .await?;
    assert_eq!(
        app.sqlstate("SELECT secret FROM warden.issuer_secret")
            .await?,
        "42501"
    );
    let shown = format!("{:?}", app.rows("SELECT * FROM warden.issuers").await?);
    assert!(
        shown.contains(ISSUER) && !shown.contains(signer.key()),
        "{shown}"
    );
    Ok(())
}

#[tokio::test]
async fn an_agent_is_masked_and_stopped_whatever_its_role() -> Result {
    let signer = Signer::generate("HS256");
    let (cluster, app) = trusting(&signer, "HS256").await?;
    cluster
        .superuser()
        .await?
        .run(
            "CREATE TABLE person (id int, email text);
             INSERT INTO person VALUES (1, 'ana.lima@example.com');
             GRANT SELECT ON person TO app;
             SELECT warden.mask('person', 'email', 'warden.partial_email');
             SELECT warden.unmask_for('app');
             GRANT warden_admin TO app",
        )
        .await?;
    app.run("CREATE TABLE mine (n int)").await?;
    let read = "SELECT email FROM person";
    assert_eq!(app.value(read).await?, "ana.lima@example.com");
    let agent = signer.token(&jwt::with(claims(), json!({"act": {"sub": "copilot"}})));
    app.value(&login(&agent)).await?;
    assert_eq!(app.value(read).await?, "a***@***.com");
    assert_eq!(app.sqlstate("DROP TABLE mine").await?, "WA001");
    app.run("SELECT warden.logout()").await?;
    assert_eq!(app.value(read).await?, "a***@***.com");
    app.value(&login(&signer.token(&claims()))).await?;
    assert_eq!(app.value(read).await?, "ana.lima@example.com");
    app.run("DROP TABLE mine").await?;
    Ok(())
}
