//! The cross-platform control socket (www.wireguard.com/xplatform), by which `wg` speaks to a device.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clustermesh_encryption_core::control::{EINVAL, EIO, REQUEST_BYTES_MAX, Request, parse};
use clustermesh_encryption_core::secret_text::SecretText;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Uid, geteuid};
use zeroize::Zeroizing;

use super::events::{ApplyError, Event, Events};
use super::handover::HOLD_MS_MAX;
use super::shared::Shared;
use crate::socket_client::socket_of;

/// Where `wg` looks for sockets.
pub const SOCKET_DIR: &str = "/var/run/wireguard";
/// Clients at the same time.
const CLIENTS_MAX: usize = 16;
/// Bytes that are read at once.
const READ_BYTES: usize = 8_192;
/// How long a client may be silent.
const CLIENT_SILENCE: Duration = Duration::from_secs(30);
/// Between a client that could not be accepted and the next attempt.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The socket of one device; removed when dropped.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
}

impl ControlSocket {
    /// Listens at `DIR/NAME.sock`, for this user only; a socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// When another process serves it, or it cannot be made.
    pub fn serve(dir: &Path, name: &str, events: Events, shared: Arc<Shared>) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let path = socket_of(dir, name);
        let failed =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        if UnixStream::connect(&path).is_ok() {
            let taken = io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process serves this device",
            );
            return Err(failed(taken));
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let clients = Arc::new(AtomicUsize::new(0));
        std::thread::Builder::new()
            .name(format!("{name}-socket"))
            .spawn(move || {
                for stream in listener.incoming() {
                    match stream {
                        Ok(stream) => serve_client(stream, &events, &shared, &clients),
                        // Without descriptors or memory for one client: the next may find them.
                        Err(error) => {
                            tracing::warn!(%error, "a client of the control socket was not served");
                            std::thread::park_timeout(ACCEPT_PAUSE);
                        }
                    }
                }
            })?;
        Ok(Self { path })
    }

    /// Where the device `name` has its socket.
    #[must_use]
    pub fn path_of(dir: &Path, name: &str) -> PathBuf {
        socket_of(dir, name)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether a user may configure the device: root, or who runs it. The file's mode says the same, but not while the
/// socket is made, and not if somebody changes it.
fn may_ask(user: Uid) -> bool {
    user.is_root() || user == geteuid()
}

/// Serves one client on a thread of its own; one too many, or a stranger, is sent away.
fn serve_client(
    stream: UnixStream,
    events: &Events,
    shared: &Arc<Shared>,
    clients: &Arc<AtomicUsize>,
) {
    match getsockopt(&stream, PeerCredentials) {
        Ok(client) if may_ask(Uid::from_raw(client.uid())) => {}
        Ok(client) => {
            let (user, process) = (client.uid(), client.pid());
            return tracing::warn!(user, process, "a user who may not was sent away");
        }
        Err(error) => return tracing::warn!(%error, "a client without credentials was sent away"),
    }
    if clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS_MAX {
        clients.fetch_sub(1, Ordering::AcqRel);
        return;
    }
    let (events, shared) = (events.clone(), Arc::clone(shared));
    let count = Arc::clone(clients);
    let spawned = std::thread::Builder::new().spawn(move || {
        // A client that goes away, or is silent, is no fault of the device.
        let _ = talk(&stream, &events, &shared);
        count.fetch_sub(1, Ordering::AcqRel);
    });
    if spawned.is_err() {
        clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn talk(stream: &UnixStream, events: &Events, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_SILENCE))?;
    stream.set_write_timeout(Some(CLIENT_SILENCE))?;
    let mut requests = Requests::new(stream);
    let mut writer = stream;
    while requests.read()? {
        let text = answer(requests.request(), events, shared);
        writer.write_all(text.as_bytes())?;
    }
    Ok(())
}

/// Requests, each up to its empty line.
struct Requests<R> {
    reader: R,
    /// What was read and not given away.
    text: SecretText,
    /// Bytes of the request that was given away last.
    taken: usize,
}

impl<R: Read> Requests<R> {
    fn new(reader: R) -> Self {
        Self {
            reader,
            text: SecretText::default(),
            taken: 0,
        }
    }

    /// Reads up to the next empty line; false at the end.
    fn read(&mut self) -> io::Result<bool> {
        self.text.drop_front(std::mem::take(&mut self.taken));
        let mut looked = 0;
        let mut room = Zeroizing::new([0; READ_BYTES]);
        loop {
            if let Some(end) = end_of_request(self.text.as_bytes(), looked) {
                self.taken = end;
                return Ok(true);
            }
            looked = self.text.as_bytes().len();
            if looked >= REQUEST_BYTES_MAX {
                let text = format!("a request of more than {REQUEST_BYTES_MAX} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            let count = self.reader.read(&mut room[..])?;
            if count == 0 {
                return Ok(false);
            }
            self.text.push(room.get(..count).unwrap_or_default());
        }
    }

    /// The request that was read; nothing where it is no text.
    fn request(&self) -> &str {
        let bytes = self.text.as_bytes().get(..self.taken);
        std::str::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
    }
}

/// Where the request ends: behind its first empty line. The first `looked` bytes have none.
fn end_of_request(bytes: &[u8], looked: usize) -> Option<usize> {
    if bytes.first() == Some(&b'\n') {
        return Some(1);
    }
    let from = looked.saturating_sub(1);
    let rest = bytes.get(from..)?;
    let found = rest.windows(2).position(|two| two == b"\n\n")?;
    Some(from + found + 2)
}

fn answer(request: &str, events: &Events, shared: &Shared) -> SecretText {
    use std::fmt::Write as _;

    let (mut text, errno) = match parse(request) {
        Ok(Request::Get(secrets)) => match events.ask(|answer| Event::Describe(secrets, answer)) {
            Ok(text) => (text, 0),
            Err(_) => (SecretText::default(), EIO),
        },
        Ok(Request::Set(changes)) => {
            let result = events
                .ask(|answer| Event::Apply(changes, answer))
                .and_then(|result| result);
            if let Err(error) = &result {
                tracing::warn!(%error, "change over the control socket refused");
            }
            let errno = match result {
                Ok(()) => 0,
                Err(ApplyError::Port { source, .. }) => source.raw_os_error().unwrap_or(EIO),
                Err(ApplyError::Config(_)) => EINVAL,
                Err(ApplyError::Closed | ApplyError::Silent) => EIO,
            };
            (SecretText::default(), errno)
        }
        Ok(Request::Fence) => {
            let deadline = Instant::now() + Duration::from_millis(HOLD_MS_MAX);
            let errno = if shared.pass_fence(deadline) { 0 } else { EIO };
            (SecretText::default(), errno)
        }
        Err(error) => {
            tracing::debug!(%error, "request over the control socket refused");
            (SecretText::default(), error.errno())
        }
    };
    // Negative, as wireguard-go has it: `wg` then knows its name. Writing to a string does not fail.
    let _ = write!(text, "errno={}\n\n", -errno);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceError;
    use crate::process::{ProcessDevice, ProcessOptions};

    const NAME: &str = "cmwg-stuck";

    /// Gives so many bytes at a time.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(self.0.len()).min(room.len());
            let (now, later) = self.0.split_at(count);
            room[..count].copy_from_slice(now);
            self.0 = later;
            Ok(count)
        }
    }

    fn all(bytes: &[u8], at_once: usize) -> Vec<String> {
        let mut requests = Requests::new(Slow(bytes, at_once));
        let mut found = Vec::new();
        while requests.read().unwrap() {
            found.push(requests.request().to_owned());
        }
        found
    }

    #[test]
    fn requests_end_at_their_empty_line_however_they_come() {
        let text = b"get=1\n\nset=1\nlisten_port=7\n\n\nget=1\n";
        for at_once in 1..text.len() {
            // One without an empty line is none.
            let expected = ["get=1\n\n", "set=1\nlisten_port=7\n\n", "\n"];
            assert_eq!(all(text, at_once), expected, "{at_once}");
        }
    }

    #[test]
    fn a_request_that_is_no_text_or_too_long_is_refused() {
        assert_eq!(all(b"\xff\xfe\n\nget=1\n\n", 100), ["", "get=1\n\n"]);
        let long = vec![b'a'; REQUEST_BYTES_MAX + 1];
        let mut requests = Requests::new(Slow(&long, READ_BYTES));
        let error = requests.read().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_device_that_is_stuck_is_silent_however_many_ask_and_has_room_for_others_again() {
        let dir = tempfile::tempdir().unwrap();
        // Nobody takes what is asked.
        let (events, _queue) = Events::queue();
        let shared = Arc::new(Shared::new(1, 0, 1_420, None).unwrap());
        let served = ControlSocket::serve(dir.path(), NAME, events, shared).unwrap();
        let ask = || {
            let mut stream = UnixStream::connect(served.path()).unwrap();
            stream.write_all(b"get=1\n\n").unwrap();
            stream
        };
        let mut clients: Vec<UnixStream> = (0..CLIENTS_MAX).map(|_| ask()).collect();
        // One too many is sent away, which is no answer either.
        let options = ProcessOptions {
            program: dir.path().join("no-program"),
            socket_dir: dir.path().to_owned(),
            mtu: 1_420,
            follows: None,
        };
        let error = ProcessDevice::open(NAME, &options).unwrap_err();
        assert!(matches!(error, DeviceError::Silent { .. }), "{error}");
        for client in &mut clients {
            let mut answer = vec![0; 64];
            let length = client.read(&mut answer).unwrap();
            let expected = format!("errno=-{EIO}\n\n");
            assert_eq!(answer.get(..length), Some(expected.as_bytes()));
        }
        drop(clients);
        let is_served = || {
            let mut stream = ask();
            let pause = Duration::from_millis(100);
            stream.set_read_timeout(Some(pause)).unwrap();
            let ended = stream.read(&mut [0]);
            ended.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        };
        let begun = std::time::Instant::now();
        while !is_served() {
            assert!(begun.elapsed() < CLIENT_SILENCE, "everybody is sent away");
        }
    }

    #[test]
    fn only_root_and_who_runs_the_device_may_ask() {
        assert!(may_ask(Uid::from_raw(0)) && may_ask(geteuid()));
        assert!(!may_ask(Uid::from_raw(geteuid().as_raw() + 65_534)));
    }
}
