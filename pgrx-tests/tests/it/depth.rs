//! Statements that are as deep as PostgreSQL allows go through us too.

use warden_tests::{Client, Cluster, Config, Mode, Result};

const TABLE: &str = "CREATE TABLE customer (id int PRIMARY KEY, email text);
                     INSERT INTO customer VALUES (1, 'secret@example.com')";

/// Statements of any depth.
const KINDS: &[(&str, fn(usize) -> String)] = &[
    ("a sum", |n| {
        format!("SELECT id{} FROM customer", " + 1".repeat(n))
    }),
    ("a masked column", |n| {
        format!(
            "SELECT length(email{}) FROM customer",
            " || email".repeat(n)
        )
    }),
    ("negations", |n| {
        format!(
            "SELECT 1 FROM customer WHERE {}(id > 0){}",
            "NOT (id > 0 AND ".repeat(n),
            ")".repeat(n)
        )
    }),
    ("subqueries", |n| {
        format!(
            "SELECT id FROM {}customer{}",
            "(SELECT * FROM ".repeat(n),
            ") x".repeat(n)
        )
    }),
    ("an assignment", |n| {
        format!(
            "UPDATE customer SET id = id{} WHERE id = -1 RETURNING email",
            " + 1".repeat(n)
        )
    }),
];

/// The greatest depth, up to some ten thousand, that a server takes.
async fn deepest(client: &Client, statement: fn(usize) -> String) -> Result<usize> {
    let (mut good, mut bad) = (1, 16_384);
    while bad - good > 1 + good / 50 {
        let n = (good + bad) / 2;
        match client.run(&statement(n)).await {
            Ok(()) => good = n,
            Err(_) => bad = n,
        }
    }
    Ok(good)
}

#[tokio::test]
async fn an_expression_may_be_as_deep_as_without_us() -> Result {
    let plain = Cluster::start(Config::new(Mode::Plain)).await?;
    let without = plain.superuser().await?;
    without.run(TABLE).await?;
    let ours = Cluster::with_warden().await?;
    let su = ours.superuser().await?;
    su.run(TABLE).await?;
    su.run(
        "SELECT warden.mask('customer', 'email', 'warden.partial_email');
         GRANT SELECT, UPDATE ON customer TO app",
    )
    .await?;
    let app = ours.connect("app", "postgres").await?;
    for (what, statement) in KINDS {
        let n = deepest(&without, *statement).await?;
        assert!(n > 30, "{what}: {n}");
        let ours = app.run(&statement(n * 9 / 10)).await;
        assert!(
            ours.is_ok(),
            "{what}, {n} deep: {:?}",
            ours.map_err(|e| e.root_cause().to_string())
        );
    }
    let many = " OR id = 1".repeat(5000);
    app.run(&format!("SELECT 1 FROM customer WHERE id = 0{many}"))
        .await
}
