//! The device of user space as a process of its own: started or adopted, and spoken to over its control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clustermesh_encryption_core::config::{Change, DeviceConfig};
use clustermesh_encryption_core::control_client::{
    AnswerError, Description, GET, read_description, read_result, set_request,
};
use clustermesh_encryption_core::difference::{difference, with_present};
use zeroize::Zeroizing;

use crate::device::{Backend, Device, DeviceError, DeviceStatus, Origin, Others};
use crate::link;

/// Name of the program.
pub const PROGRAM: &str = "clustermesh-wireguard";
/// Longest wait for an answer of the device.
const ANSWER_SECONDS_MAX: u64 = 10;
/// Longest answer, bytes: 65,536 peers with a few prefixes each.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Steps in one request, far below what the device reads at once.
const STEPS_PER_REQUEST_MAX: usize = 4_096;
/// A device whose network device was deleted ends within this.
const END_SECONDS_MAX: u64 = 10;

/// How the device is run when it is not running.
#[derive(Clone, Debug)]
pub struct ProcessOptions {
    /// The program.
    pub program: PathBuf,
    /// Folder of the control socket; `wg` looks into [`crate::userspace::control_socket::SOCKET_DIR`].
    pub socket_dir: PathBuf,
    /// MTU of a new device, bytes.
    pub mtu: u32,
}

/// A device that a process of its own runs.
#[derive(Debug)]
pub struct ProcessDevice {
    name: String,
    socket: PathBuf,
}

impl ProcessDevice {
    /// Finds the device running, or starts it, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When it does not run and cannot be started.
    pub fn open(name: &str, options: &ProcessOptions) -> Result<(Self, Origin), DeviceError> {
        let device = Self {
            name: name.to_owned(),
            socket: options.socket_dir.join(format!("{name}.sock")),
        };
        match device.describe() {
            Ok(_) => return Ok((device, Origin::Adopted)),
            Err(DeviceError::Io { source, .. }) if is_unserved(&source) => {}
            // It lives, and carries packets perhaps: whoever asks tries again.
            Err(error) => return Err(error),
        }
        // One that is there without its process can only be in the way.
        link::delete(name).map_err(|source| device.failed("replace", source))?;
        let status = Command::new(&options.program)
            .arg(name)
            .arg("--socket-dir")
            .arg(&options.socket_dir)
            .arg("--mtu")
            .arg(options.mtu.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        let not_started = |detail: String| DeviceError::NotStarted {
            program: options.program.display().to_string(),
            device: name.to_owned(),
            detail,
        };
        let status = status.map_err(|error| not_started(error.to_string()))?;
        if !status.success() {
            return Err(not_started(status.to_string()));
        }
        Ok((device, Origin::Started))
    }

    /// Where its control socket is.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn failed(&self, action: &'static str, source: io::Error) -> DeviceError {
        DeviceError::Io {
            action,
            device: self.name.clone(),
            source,
        }
    }

    fn misunderstood(&self, source: AnswerError) -> DeviceError {
        DeviceError::Answer {
            device: self.name.clone(),
            source,
        }
    }

    fn describe(&self) -> Result<Description, DeviceError> {
        let answer = ask(&self.socket, GET).map_err(|source| self.failed("ask", source))?;
        read_description(&answer).map_err(|source| self.misunderstood(source))
    }

    fn apply(&self, changes: &[Change]) -> Result<(), DeviceError> {
        for steps in changes.chunks(STEPS_PER_REQUEST_MAX) {
            let answer = ask(&self.socket, &set_request(steps))
                .map_err(|source| self.failed("change", source))?;
            read_result(&answer).map_err(|source| self.misunderstood(source))?;
        }
        Ok(())
    }
}

impl Device for ProcessDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn backend(&self) -> Backend {
        Backend::Userspace
    }

    fn configure(&self, wanted: &DeviceConfig, others: Others) -> Result<usize, DeviceError> {
        let actual = self.describe()?.config;
        let whole = match others {
            Others::Removed => wanted,
            Others::Kept => &with_present(&actual, wanted),
        };
        let changes = difference(&actual, whole).map_err(|source| DeviceError::Difference {
            device: self.name.clone(),
            source,
        })?;
        self.apply(&changes)?;
        Ok(changes.len())
    }

    fn status(&self) -> Result<DeviceStatus, DeviceError> {
        self.describe().map(DeviceStatus::from)
    }

    fn remove(self: Box<Self>) -> Result<(), DeviceError> {
        let process = UnixStream::connect(&self.socket);
        link::delete(&self.name).map_err(|source| self.failed("remove", source))?;
        let Ok(mut process) = process else {
            return Ok(());
        };
        // The process ends with its network device, and connections with it.
        process
            .set_read_timeout(Some(Duration::from_secs(END_SECONDS_MAX)))
            .and_then(|()| process.read(&mut [0]))
            .map(drop)
            .map_err(|source| self.failed("end", source))
    }
}

/// Whether nobody listens on the socket.
fn is_unserved(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// One request and its answer, up to the empty line.
fn ask(socket: &Path, request: &str) -> io::Result<Zeroizing<String>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
    stream.set_write_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
    stream.write_all(request.as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut answer = Zeroizing::new(String::new());
    loop {
        let before = answer.len();
        if reader.read_line(&mut answer)? == 0 || answer.get(before..) == Some("\n") {
            return Ok(answer);
        }
        if answer.len() > ANSWER_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("an answer of more than {ANSWER_BYTES_MAX} bytes"),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const NAME: &str = "cmwg-none";

    fn options(dir: &Path) -> ProcessOptions {
        ProcessOptions {
            program: dir.join("no-program"),
            socket_dir: dir.to_owned(),
            mtu: 1_420,
        }
    }

    #[test]
    fn a_device_that_gives_a_bad_answer_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("{NAME}.sock"))).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut vec![0; GET.len()]).unwrap();
        });
        let error = ProcessDevice::open(NAME, &options(dir.path())).unwrap_err();
        server.join().unwrap();
        assert!(matches!(error, DeviceError::Answer { .. }), "{error}");
    }

    #[test]
    fn a_device_whose_socket_nobody_serves_is_started() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join(format!("{NAME}.sock"));
        for is_left_over in [false, true] {
            if is_left_over {
                drop(UnixListener::bind(&socket).unwrap());
            }
            let error = ProcessDevice::open(NAME, &options(dir.path())).unwrap_err();
            assert!(matches!(error, DeviceError::NotStarted { .. }), "{error}");
        }
    }
}
