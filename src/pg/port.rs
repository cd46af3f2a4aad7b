//! The client's connection, as the server keeps it.
//!
//! Owns the layout of `Port` and `HbaLine` up to the fields that are read here: pgrx does not bind
//! them. Reads this process's memory only, so it works before authentication, and outside of
//! transactions.

use crate::pg::session::{socket_address, text};
use pgrx::pg_sys;
use std::ffi::{c_char, c_int, c_uint, c_void};
use warden_core::connection::{ConnectionFacts, ConnectionKind};

/// `struct Port` of libpq/libpq-be.h.
#[repr(C)]
struct Port {
    sock: c_int,
    noblock: bool,
    proto: u32,
    laddr: pg_sys::SockAddr,
    raddr: pg_sys::SockAddr,
    remote_host: *const c_char,
    remote_hostname: *const c_char,
    remote_hostname_resolv: c_int,
    remote_hostname_errcode: c_int,
    remote_port: *const c_char,
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    can_accept_connections: c_uint,
    #[cfg(feature = "pg18")]
    local_host: [c_char; 64],
    database_name: *const c_char,
    user_name: *const c_char,
    cmdline_options: *const c_char,
    guc_options: *mut pg_sys::List,
    application_name: *const c_char,
    hba: *const HbaLine,
    #[cfg(feature = "pg15")]
    authn_id: *const c_char,
    keepalives: [c_int; 8],
    #[cfg(feature = "pg18")]
    scram_keys: [u8; 64],
    #[cfg(feature = "pg18")]
    has_scram_keys: bool,
    gss: *mut c_void,
    ssl_in_use: bool,
}

/// `struct HbaLine` of libpq/hba.h.
#[repr(C)]
struct HbaLine {
    #[cfg(not(feature = "pg15"))]
    sourcefile: *const c_char,
    linenumber: c_int,
    rawline: *const c_char,
    conntype: c_uint,
    databases: *mut pg_sys::List,
    roles: *mut pg_sys::List,
    addr: libc::sockaddr_storage,
    addrlen: c_int,
    mask: libc::sockaddr_storage,
    masklen: c_int,
    ip_cmp_method: c_uint,
    hostname: *const c_char,
    auth_method: c_uint,
}

unsafe extern "C" {
    fn hba_authname(method: c_uint) -> *const c_char;
    #[cfg(not(feature = "pg15"))]
    static MyClientConnectionInfo: ClientConnectionInfo;
}

/// `struct ClientConnectionInfo` of libpq/libpq-be.h.
#[cfg(not(feature = "pg15"))]
#[repr(C)]
struct ClientConnectionInfo {
    authn_id: *const c_char,
    auth_method: c_uint,
}

fn mine() -> Option<&'static Port> {
    // SAFETY: the server's own structure, which lives as long as the process.
    unsafe { pg_sys::MyProcPort.cast::<Port>().cast_const().as_ref() }
}

/// Whether this process serves a client.
#[inline]
pub fn exists() -> bool {
    // SAFETY: reads a variable of this process.
    unsafe { !pg_sys::MyProcPort.is_null() }
}

/// What the startup packet and the socket say.
pub fn facts() -> ConnectionFacts {
    let mut f = ConnectionFacts {
        pid: std::process::id(),
        count: 1,
        ..ConnectionFacts::default()
    };
    let Some(port) = mine() else {
        return f;
    };
    // SAFETY: strings of the port are null or NUL-terminated, and stay; the address is initialised
    // before any of our hooks runs.
    unsafe {
        f.database = text(port.database_name);
        f.role = text(port.user_name);
        f.application_name = text(port.application_name);
        f.tls = port.ssl_in_use;
        if pg_sys::am_walsender {
            f.kind = ConnectionKind::Replication;
        }
        if let Some(client) = socket_address(std::ptr::addr_of!(port.raddr.addr).cast()) {
            f.client_addr = client.ip().to_string();
            f.client_port = u32::from(client.port());
        }
    }
    f
}

/// The authentication method, and who it found the client to be.
///
/// # Safety
/// Before the session is usable: the line of pg_hba.conf is forgotten then.
pub unsafe fn authentication() -> (String, String) {
    let Some(port) = mine() else {
        return Default::default();
    };
    // SAFETY: see above; strings are null or NUL-terminated.
    unsafe {
        let method = match port.hba.as_ref() {
            Some(line) => text(hba_authname(line.auth_method)),
            None => String::new(),
        };
        #[cfg(feature = "pg15")]
        let identity = text(port.authn_id);
        #[cfg(not(feature = "pg15"))]
        let identity = text(MyClientConnectionInfo.authn_id);
        (method, identity)
    }
}
