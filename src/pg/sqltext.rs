//! Opens `libwarden_sqltext.so`, and asks it for fingerprints.
//!
//! It lies beside the server's other libraries and is loaded in the recorder only, at the first
//! statement that needs it. Without it fingerprints are empty, and one WARNING says so.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use pgrx::pg_sys;
use std::ffi::{CStr, CString, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use warden_core::join::Fingerprint;

type Call = unsafe extern "C" fn(*const c_char) -> *mut c_char;
type Free = unsafe extern "C" fn(*mut c_char);

struct Loaded {
    fingerprint: Call,
    free: Free,
    /// Keeps both in memory.
    _library: Library,
}

/// The library, or the knowledge that there is none.
#[derive(Default)]
pub struct SqlText(Option<Option<Loaded>>);

impl Fingerprint for SqlText {
    fn fingerprint(&mut self, text: &str) -> String {
        let loaded = self.0.get_or_insert_with(|| match load() {
            Ok(loaded) => Some(loaded),
            Err(e) => {
                pgrx::warning!("pg_warden: statements are recorded without fingerprints: {e}");
                None
            }
        });
        let (Some(loaded), Ok(text)) = (loaded, CString::new(text)) else {
            return String::new();
        };
        // SAFETY: the signatures are those of warden-sqltext; the result is copied, then released.
        unsafe {
            let p = (loaded.fingerprint)(text.as_ptr());
            if p.is_null() {
                return String::new();
            }
            let fingerprint = CStr::from_ptr(p).to_string_lossy().into_owned();
            (loaded.free)(p);
            fingerprint
        }
    }
}

fn path() -> PathBuf {
    // SAFETY: set once, at server start, to a NUL-terminated path.
    let directory = unsafe { CStr::from_ptr((&raw const pg_sys::pkglib_path).cast()) };
    PathBuf::from(OsStr::from_bytes(directory.to_bytes())).join("libwarden_sqltext.so")
}

fn load() -> Result<Loaded, libloading::Error> {
    // SAFETY: our own library, which has no initialisers; RTLD_LOCAL keeps its `palloc` and the
    // like from the server's, see trap T1 of the design.
    unsafe {
        let library = Library::open(Some(path()), RTLD_NOW | RTLD_LOCAL)?;
        let fingerprint = *library.get::<Call>(b"warden_sqltext_fingerprint\0")?;
        let free = *library.get::<Free>(b"warden_sqltext_free\0")?;
        Ok(Loaded {
            fingerprint,
            free,
            _library: library,
        })
    }
}
