//! The cross-platform control socket (www.wireguard.com/xplatform), by which `wg` speaks to a device.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clustermesh_encryption_core::control::{EINVAL, EIO, REQUEST_BYTES_MAX, Request, parse};

use super::control::{ApplyError, Event, Events};

/// Where `wg` looks for sockets.
pub const SOCKET_DIR: &str = "/var/run/wireguard";
/// Clients at the same time.
const CLIENTS_MAX: usize = 16;
/// How long a client may be silent.
const CLIENT_SILENCE: Duration = Duration::from_secs(30);

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
    pub fn serve(dir: &Path, name: &str, events: Events) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let path = dir.join(format!("{name}.sock"));
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
                for stream in listener.incoming().map_while(Result::ok) {
                    serve_client(stream, &events, &clients);
                }
            })?;
        Ok(Self { path })
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

/// Serves one client on a thread of its own; one too many is sent away.
fn serve_client(stream: UnixStream, events: &Events, clients: &Arc<AtomicUsize>) {
    if clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS_MAX {
        clients.fetch_sub(1, Ordering::AcqRel);
        return;
    }
    let (events, count) = (events.clone(), Arc::clone(clients));
    let spawned = std::thread::Builder::new().spawn(move || {
        // A client that goes away, or is silent, is no fault of the device.
        let _ = talk(&stream, &events);
        count.fetch_sub(1, Ordering::AcqRel);
    });
    if spawned.is_err() {
        clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn talk(stream: &UnixStream, events: &Events) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_SILENCE))?;
    stream.set_write_timeout(Some(CLIENT_SILENCE))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(request) = read_request(&mut reader)? {
        writer.write_all(answer(&request, events).as_bytes())?;
    }
    Ok(())
}

/// Reads up to the empty line; `None` at the end.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut request = String::new();
    loop {
        let room = REQUEST_BYTES_MAX.saturating_sub(request.len()) as u64;
        let before = request.len();
        if reader.take(room).read_line(&mut request)? == 0 {
            return Ok(None);
        }
        if request.get(before..) == Some("\n") {
            return Ok(Some(request));
        }
    }
}

fn answer(request: &str, events: &Events) -> String {
    let (text, errno) = match parse(request) {
        Ok(Request::Get) => match events.ask(Event::Describe) {
            Ok(text) => (text, 0),
            Err(_) => (String::new(), EIO),
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
                Err(ApplyError::Closed) => EIO,
            };
            (String::new(), errno)
        }
        Err(error) => {
            tracing::debug!(%error, "request over the control socket refused");
            (String::new(), error.errno())
        }
    };
    // Negative, as wireguard-go has it: `wg` then knows its name.
    format!("{text}errno={}\n\n", -errno)
}
