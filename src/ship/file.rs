//! File sinks: appends a batch to a file, durably.
//!
//! A batch is acknowledged when it is on disk. A line that a crash has torn is ended before the next
//! batch follows, so that it spoils no other line; its event is sent again.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Appends `body` to `directory/name`, and returns when it is on disk.
///
/// The name must be a plain one, as [`warden_core::sink::Target::parse`] grants it.
///
/// # Errors
/// If anything fails; then the file is as before, as far as that can be had.
pub fn append(directory: &Path, name: &str, body: &[u8]) -> io::Result<()> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a plain file name",
        ));
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let path = directory.join(name);
    let fresh = path.symlink_metadata().is_err();
    // O_NONBLOCK: opening a FIFO must not hang; it is refused below.
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(&path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    // The shipper of another database may write to the same file.
    file.try_lock().map_err(|e| match e {
        TryLockError::Error(e) => e,
        TryLockError::WouldBlock => io::Error::new(io::ErrorKind::WouldBlock, "the file is locked"),
    })?;
    let length = file.metadata()?.len();
    let torn = length > 0 && last_byte(&mut file)? != b'\n';
    let written = (|| {
        if torn {
            file.write_all(b"\n")?;
        }
        file.write_all(body)?;
        file.sync_all()
    })();
    if written.is_err() {
        // A full disk must not collect a torn line with every attempt.
        let _ = file.set_len(length);
        return written;
    }
    if fresh {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

fn last_byte(file: &mut File) -> io::Result<u8> {
    let mut b = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut b)?;
    Ok(b[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::PathBuf;

    fn directory(test: &str) -> PathBuf {
        let d = std::env::temp_dir().join(format!("warden-file-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&d);
        d
    }

    #[test]
    fn batches_follow_each_other_in_a_private_file() {
        let d = directory("private");
        append(&d, "a.ndjson", b"1\n2\n").unwrap();
        append(&d, "a.ndjson", b"3\n").unwrap();
        assert_eq!(std::fs::read(d.join("a.ndjson")).unwrap(), b"1\n2\n3\n");
        assert_eq!(d.join("a.ndjson").metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(d.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::remove_dir_all(d).unwrap();
    }

    #[test]
    fn a_torn_line_is_ended_first() {
        let d = directory("torn");
        append(&d, "a", b"1\n").unwrap();
        OpenOptions::new()
            .append(true)
            .open(d.join("a"))
            .unwrap()
            .write_all(b"{\"se")
            .unwrap();
        append(&d, "a", b"2\n").unwrap();
        assert_eq!(std::fs::read(d.join("a")).unwrap(), b"1\n{\"se\n2\n");
        std::fs::remove_dir_all(d).unwrap();
    }

    #[test]
    fn no_other_file_of_the_server_is_written() {
        let d = directory("escape");
        std::fs::create_dir_all(&d).unwrap();
        let outside = d.with_extension("outside");
        std::fs::write(&outside, b"x").unwrap();
        symlink(&outside, d.join("link")).unwrap();
        symlink("/nonexistent/x", d.join("dangling")).unwrap();
        std::fs::create_dir(d.join("dir")).unwrap();
        for name in [
            "link",
            "dangling",
            "dir",
            "../escape",
            "a/b",
            "/etc/x",
            ".x",
            "",
            "a\0b",
        ] {
            assert!(append(&d, name, b"1\n").is_err(), "{name}");
        }
        assert_eq!(std::fs::read(&outside).unwrap(), b"x");
        std::fs::remove_file(outside).unwrap();
        std::fs::remove_dir_all(d).unwrap();
    }

    #[test]
    fn a_device_is_refused_and_not_waited_for() {
        assert!(append(Path::new("/dev"), "full", b"1\n").is_err());
    }

    #[test]
    fn a_file_that_somebody_else_writes_is_left_alone() {
        let d = directory("lock");
        append(&d, "a", b"1\n").unwrap();
        let other = File::open(d.join("a")).unwrap();
        other.lock().unwrap();
        assert_eq!(
            append(&d, "a", b"2\n").unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(other);
        append(&d, "a", b"2\n").unwrap();
        std::fs::remove_dir_all(d).unwrap();
    }
}
