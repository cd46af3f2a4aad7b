//! The facts about the session that each statement refers to.
//!
//! Owns the backend's random number and the sessions facts that this backend has recorded. Facts go
//! to the journal when they are new: at the first statement, and when a role, the actor or the
//! application's name changes.

use crate::pg::local::Local;
use crate::pg::shared::shared;
use crate::pg::{identity, journal, port};
use pgrx::pg_sys;
use siphasher::sip::SipHasher13;
use std::ffi::{CStr, c_int};
use std::hash::Hasher;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use warden_core::event::{Actor, ActorKind, SessionFacts};
use warden_core::frame::FrameKind;

/// Combinations of roles that a backend remembers; SECURITY DEFINER functions switch between them.
const REMEMBERED: usize = 16;

#[derive(Clone)]
struct Known {
    dest: u32,
    session_user: pg_sys::Oid,
    current_user: pg_sys::Oid,
    actor: u64,
    application: Vec<u8>,
    key: u64,
}

struct State {
    backend: u64,
    known: Vec<Known>,
    /// Database and session user, as last looked up.
    names: (String, String),
}

static STATE: Local<State> = Local::new(State {
    backend: 0,
    known: Vec::new(),
    names: (String::new(), String::new()),
});

unsafe extern "C" {
    fn GetUserId() -> pg_sys::Oid;
    fn GetSessionUserId() -> pg_sys::Oid;
}

/// The backend's random number: never 0, and positive as a bigint.
pub fn backend() -> u64 {
    STATE.with(|s| {
        if s.backend == 0 {
            let mut b = [0u8; 8];
            // SAFETY: fills eight bytes. Without random numbers, the process id and clock must do.
            let ok = unsafe { pg_sys::pg_strong_random(b.as_mut_ptr().cast(), 8) };
            let n = if ok {
                u64::from_le_bytes(b)
            } else {
                // SAFETY: reads a variable of this process.
                (unsafe { pg_sys::MyStartTimestamp } as u64) ^ u64::from(std::process::id())
            };
            s.backend = (n >> 1) | 1;
        }
        s.backend
    })
}

/// The key of the session facts in force; they are appended to the journal if they are new to it.
/// `None` if the journal is full.
pub fn key(dest: u32) -> Option<u64> {
    // SAFETY: plain getters of this process's state.
    let (session_user, current_user, application) = unsafe {
        (
            GetSessionUserId(),
            GetUserId(),
            c_bytes(pg_sys::application_name),
        )
    };
    let actor = identity::generation();
    let found = STATE.with(|s| {
        let i = s.known.iter().position(|k| {
            k.dest == dest
                && k.session_user == session_user
                && k.current_user == current_user
                && k.actor == actor
                && k.application == application
        })?;
        // The one used last comes first.
        s.known.swap(0, i);
        Some(s.known[0].key)
    });
    if found.is_some() {
        return found;
    }
    let facts = facts(session_user, current_user);
    let payload = facts.encode();
    let (k0, k1) = shared().hash_key();
    let mut hasher = SipHasher13::new_with_keys(k0, k1);
    hasher.write(&payload);
    let key = (hasher.finish() >> 1) | 1;
    let mut frame = key.to_le_bytes().to_vec();
    frame.extend_from_slice(&payload);
    journal::append(FrameKind::Session, dest, &frame, true).ok()?;
    let known = Known {
        dest,
        session_user,
        current_user,
        actor,
        application: application.to_vec(),
        key,
    };
    // SAFETY: reads the transaction's state. Names that could not be looked up are not remembered.
    if unsafe { pg_sys::IsTransactionState() } {
        STATE.with(|s| {
            s.known.truncate(REMEMBERED - 1);
            s.known.insert(0, known);
        });
    }
    Some(key)
}

/// Forgets which facts have been sent: they are recorded again with the next statement.
pub fn forget() {
    STATE.with(|s| s.known.clear());
}

fn facts(session_user: pg_sys::Oid, current_user: pg_sys::Oid) -> SessionFacts {
    // SAFETY: reads this process's state; the port, if there is one, lives as long as the process.
    unsafe {
        let mut f = SessionFacts {
            session: backend(),
            pid: std::process::id(),
            backend_start: pg_sys::MyStartTimestamp,
            application_name: text(pg_sys::application_name),
            ..SessionFacts::default()
        };
        if let Some(client) = client() {
            f.client_addr = client.ip().to_string();
            f.client_port = u32::from(client.port());
        }
        if pg_sys::IsTransactionState() {
            f.database = text(pg_sys::get_database_name(pg_sys::MyDatabaseId));
            f.session_user = text(pg_sys::GetUserNameFromId(session_user, true));
            f.current_user = text(pg_sys::GetUserNameFromId(current_user, true));
            STATE.with(|s| s.names = (f.database.clone(), f.session_user.clone()));
        } else {
            // No catalog can be read now; the names of an earlier statement must do.
            (f.database, f.session_user) = STATE.with(|s| s.names.clone());
            if f.session_user.is_empty() {
                let asked_for = port::facts();
                (f.database, f.session_user) = (asked_for.database, asked_for.role);
            }
            if session_user == current_user {
                f.current_user = f.session_user.clone();
            }
        }
        f.actor = identity::with_actor(|a| a.cloned()).unwrap_or_else(|| Actor {
            subject: f.session_user.clone(),
            kind: if identity::is_agent() {
                ActorKind::Agent
            } else {
                ActorKind::Unknown
            },
            ..Actor::default()
        });
        f
    }
}

/// The client's address, if it came over a network.
unsafe fn client() -> Option<SocketAddr> {
    // SAFETY: the backend's own entry.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        if entry.is_null() {
            return None;
        }
        socket_address(std::ptr::addr_of!((*entry).st_clientaddr.addr).cast())
    }
}

/// The address in a socket's structure, if it is one of a network.
///
/// # Safety
/// `address` points to a valid `sockaddr_storage`.
pub unsafe fn socket_address(address: *const libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: the address family says which structure it is.
    unsafe {
        match c_int::from((*address).ss_family) {
            libc::AF_INET => {
                let a = &*address.cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr));
                Some(SocketAddr::new(ip.into(), u16::from_be(a.sin_port)))
            }
            libc::AF_INET6 => {
                let a = &*address.cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(a.sin6_addr.s6_addr);
                Some(SocketAddr::new(ip.into(), u16::from_be(a.sin6_port)))
            }
            _ => None,
        }
    }
}

/// The bytes of a C string; none for null.
///
/// # Safety
/// `p` is null or NUL-terminated, and is not changed while the slice is used.
unsafe fn c_bytes<'a>(p: *const std::ffi::c_char) -> &'a [u8] {
    if p.is_null() {
        return &[];
    }
    // SAFETY: see above.
    unsafe { CStr::from_ptr(p) }.to_bytes()
}

/// A C string as text; empty for null.
///
/// # Safety
/// As [`c_bytes`].
pub unsafe fn text(p: *const std::ffi::c_char) -> String {
    // SAFETY: see above.
    String::from_utf8_lossy(unsafe { c_bytes(p) }).into_owned()
}
