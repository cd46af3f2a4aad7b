//! `warden-receiver PORT [FILE]`: takes events of an HTTP sink, prints one line for each, and
//! appends them to FILE, if there is one. Runs until it is killed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::Mutex;
use warden_tests::receiver::Receiver;

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let Some(port) = arguments.next().and_then(|p| p.parse::<u16>().ok()) else {
        eprintln!("usage: warden-receiver PORT [FILE]");
        std::process::exit(2);
    };
    let file = match arguments.next() {
        Some(name) => Some(Mutex::new(
            OpenOptions::new().create(true).append(true).open(name)?,
        )),
        None => None,
    };
    let receiver = Receiver::on_port(
        port,
        Some(Box::new(move |event, line| {
            show(event);
            if let Some(Ok(mut f)) = file.as_ref().map(Mutex::lock) {
                keep(&mut f, line);
            }
        })),
    )?;
    println!("listening on {}", receiver.url());
    loop {
        std::thread::park();
    }
}

fn keep(file: &mut File, line: &str) {
    if let Err(e) = writeln!(file, "{line}") {
        eprintln!("warden-receiver: {e}");
    }
}

/// One line for a reader: number, kind, outcome, who, what.
fn show(e: &serde_json::Value) {
    let text = |pointer: &str| {
        e.pointer(pointer)
            .and_then(|v| v.as_str())
            .unwrap_or_default()
    };
    let statement: String = text("/statement/text")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    let mut line = format!("{} {}", e["seq"], text("/kind"));
    for part in [text("/outcome"), text("/actor/subject")] {
        if !part.is_empty() {
            line = format!("{line} {part}");
        }
    }
    for (label, part) in [
        ("for", text("/actor/on_behalf_of")),
        ("rule", text("/execution/rule")),
    ] {
        if !part.is_empty() {
            line = format!("{line} {label} {part}");
        }
    }
    if !statement.is_empty() {
        let short: String = statement.chars().take(100).collect();
        line = format!("{line}: {short}");
    }
    // A reader that went away is no reason to stop receiving.
    let _ = writeln!(io::stdout(), "{line}");
}
