//! What happens when the library is loaded: settings, hooks, shared memory, launcher.

use crate::pg::{connections, drops, fastpath, flush, hooks, journal, launcher, mask, shared};
use crate::settings;
use pgrx::{pg_guard, pg_sys};

static mut PREV_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREV_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// Loads everything if the server preloads us. Otherwise the SQL functions are all there is.
pub fn init() {
    // SAFETY: reads a variable of this process; then, the postmaster has one thread.
    unsafe {
        if !pg_sys::process_shared_preload_libraries_in_progress {
            return;
        }
        forgo_backtraces();
        settings::init();
        pg_sys::MarkGUCPrefixReserved(c"warden".as_ptr());
        // pg_upgrade's own servers: nobody else can connect, and what it does to our objects, it must.
        if pg_sys::IsBinaryUpgrade {
            return;
        }
        PREV_REQUEST = (&raw mut pg_sys::shmem_request_hook).replace(Some(request));
        PREV_STARTUP = (&raw mut pg_sys::shmem_startup_hook).replace(Some(startup));
    }
    hooks::install();
    connections::install();
    fastpath::install();
    mask::install();
    drops::install();
    launcher::register();
}

/// pgrx asks for a backtrace of every error that passes it, which takes milliseconds and goes to the
/// client, if `RUST_BACKTRACE` is set in the server's environment. The standard library looks there once,
/// and remembers: it gets to see that none is wanted. The environment stays as it was.
unsafe fn forgo_backtraces() {
    const SETTING: &str = "RUST_LIB_BACKTRACE";
    let was = std::env::var_os(SETTING);
    // SAFETY: the postmaster has one thread.
    unsafe {
        std::env::set_var(SETTING, "0");
        drop(std::backtrace::Backtrace::capture());
        match was {
            Some(value) => std::env::set_var(SETTING, value),
            None => std::env::remove_var(SETTING),
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn request() {
    // SAFETY: the previous hook.
    unsafe {
        if let Some(prev) = PREV_REQUEST {
            prev();
        }
    }
    shared::request();
    flush::request();
}

#[pg_guard]
unsafe extern "C-unwind" fn startup() {
    // SAFETY: the previous hook.
    unsafe {
        if let Some(prev) = PREV_STARTUP {
            prev();
        }
    }
    flush::attach();
    if shared::attach() {
        journal::startup();
    }
}
