//! The device of user space as a process of its own: started or adopted, and spoken to over its control socket.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clustermesh_encryption_core::config::Change;
use clustermesh_encryption_core::control_client::{
    AnswerError, Description, GET, GET_STATUS, read_description, read_result, set_request,
};
use clustermesh_encryption_core::secret_text::SecretText;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

use crate::device::{Backend, Device, DeviceError, DeviceStatus, Origin};
use crate::link;
use crate::socket_client::{ask, connect_now, socket_of};

/// Name of the program.
pub const PROGRAM: &str = "clustermesh-wireguard";
/// Longest wait for one whole answer of the device: one that lives gives it in milliseconds.
pub const ANSWER_SECONDS_MAX: u64 = 5;
/// Steps in one request, far below what the device reads at once.
const STEPS_PER_REQUEST_MAX: usize = 4_096;
/// A device whose network device was deleted ends within this, and one that is killed.
const END_SECONDS_MAX: u64 = 10;
/// The kernel keeps so many bytes of a process's name.
const PROCESS_NAME_BYTES: usize = 15;

/// How the device is run when it is not running.
#[derive(Clone, Debug)]
pub struct ProcessOptions {
    /// The program.
    pub program: PathBuf,
    /// Folder of the control socket; `wg` looks into [`crate::userspace::control_socket::SOCKET_DIR`].
    pub socket_dir: PathBuf,
    /// MTU of a new device, bytes.
    pub mtu: u32,
    /// Network device whose packets a new one lets go first, in the same folder: that of the key before.
    pub follows: Option<String>,
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
            socket: socket_of(&options.socket_dir, name),
        };
        match device.status() {
            Ok(_) => return Ok((device, Origin::Adopted)),
            Err(DeviceError::Io { source, .. }) if is_unserved(&source) => {}
            // It lives, and carries packets perhaps: whoever asks tries again.
            Err(error) => return Err(error),
        }
        // One that is there without its process can only be in the way.
        link::delete(name).map_err(|source| device.failed("replace", source))?;
        let follows = options.follows.iter().flat_map(|old| ["--follows", old]);
        let status = Command::new(&options.program)
            .arg(name)
            .arg("--socket-dir")
            .arg(&options.socket_dir)
            .arg("--mtu")
            .arg(options.mtu.to_string())
            .args(follows)
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
        failed(&self.name, action, source)
    }

    fn misunderstood(&self, source: AnswerError) -> DeviceError {
        DeviceError::Answer {
            device: self.name.clone(),
            source,
        }
    }

    /// One request and its answer, up to the empty line.
    fn ask(&self, action: &'static str, request: &[u8]) -> Result<SecretText, DeviceError> {
        let patience = Duration::from_secs(ANSWER_SECONDS_MAX);
        ask(&self.socket, request, Instant::now() + patience)
            .map_err(|source| self.failed(action, source))
    }

    fn read(&self, question: &str) -> Result<Description, DeviceError> {
        let answer = self.ask("ask", question.as_bytes())?;
        read_description(answer.as_str()).map_err(|source| self.misunderstood(source))
    }
}

fn failed(name: &str, action: &'static str, source: io::Error) -> DeviceError {
    let device = name.to_owned();
    match source.kind() {
        // Sent away without a word: so does a device with too many clients whom it does not answer.
        io::ErrorKind::WouldBlock
        | io::ErrorKind::TimedOut
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => DeviceError::Silent {
            device,
            waited_seconds: ANSWER_SECONDS_MAX,
        },
        _ => DeviceError::Io {
            action,
            device,
            source,
        },
    }
}

/// Ends the process of a device that gives no answer, so that it can be started again; none there is fine.
///
/// # Errors
/// When something else than our program serves the socket, or it does not end.
pub fn end_silent(name: &str, socket_dir: &Path) -> Result<(), DeviceError> {
    let failed = |source| failed(name, "end", source);
    let mut stream = match connect_now(&socket_of(socket_dir, name)) {
        Err(error) if is_unserved(&error) => return Ok(()),
        other => other.map_err(failed)?,
    };
    let server = getsockopt(&stream, PeerCredentials).map_err(|error| failed(error.into()))?;
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", server.pid()));
    let comm = comm.unwrap_or_default();
    // 0 is a process of another PID namespace, and to kill() all of our own group.
    if server.pid() <= 1 || Some(comm.trim()) != PROGRAM.get(..PROCESS_NAME_BYTES) {
        return Err(failed(io::Error::other(format!(
            "its control socket is served by process {} ({}), which is no {PROGRAM}: end that one",
            server.pid(),
            comm.trim()
        ))));
    }
    kill(Pid::from_raw(server.pid()), Signal::SIGKILL).map_err(|error| failed(error.into()))?;
    // The connection ends with the process.
    stream
        .set_read_timeout(Some(Duration::from_secs(END_SECONDS_MAX)))
        .map_err(failed)?;
    match stream.read(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        other => other.map(drop).map_err(failed),
    }
}

impl Device for ProcessDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn backend(&self) -> Backend {
        Backend::Userspace
    }

    fn describe(&self) -> Result<Description, DeviceError> {
        self.read(GET)
    }

    fn apply(&self, changes: &[Change]) -> Result<(), DeviceError> {
        for steps in changes.chunks(STEPS_PER_REQUEST_MAX) {
            let answer = self.ask("change", set_request(steps).as_bytes())?;
            read_result(answer.as_str()).map_err(|source| self.misunderstood(source))?;
        }
        Ok(())
    }

    fn status(&self) -> Result<DeviceStatus, DeviceError> {
        match self.read(GET_STATUS) {
            // One of before this question: it outlives the agents that ask.
            Err(DeviceError::Answer {
                source: AnswerError::Refused(errno),
                ..
            }) if errno == Errno::EPROTO as i32 => self.describe(),
            other => other,
        }
        .map(DeviceStatus::from)
    }

    fn remove(&self) -> Result<(), DeviceError> {
        let process = connect_now(&self.socket);
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    const NAME: &str = "cmwg-none";

    fn options(dir: &Path) -> ProcessOptions {
        ProcessOptions {
            program: dir.join("no-program"),
            socket_dir: dir.to_owned(),
            mtu: 1_420,
            follows: None,
        }
    }

    #[test]
    fn a_device_that_gives_a_bad_answer_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("{NAME}.sock"))).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut vec![0; GET_STATUS.len()]).unwrap();
            stream.write_all(b"hello\n\n").unwrap();
        });
        let error = ProcessDevice::open(NAME, &options(dir.path())).unwrap_err();
        server.join().unwrap();
        assert!(matches!(error, DeviceError::Answer { .. }), "{error}");
    }

    #[test]
    fn a_device_of_before_the_question_for_its_status_is_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("{NAME}.sock"))).unwrap();
        let server = std::thread::spawn(move || {
            let errno = Errno::EPROTO as i32;
            for (asked, answer) in [
                (GET_STATUS, format!("errno={errno}\n\n")),
                (GET, "listen_port=51871\nerrno=0\n\n".to_owned()),
            ] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = vec![0; asked.len()];
                stream.read_exact(&mut request).unwrap();
                assert_eq!(request, asked.as_bytes());
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let (_, origin) = ProcessDevice::open(NAME, &options(dir.path())).unwrap();
        server.join().unwrap();
        assert_eq!(origin, Origin::Adopted);
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

    /// Serves the socket like this for one connection, and gives what a device says of it.
    fn status_of(serve: impl FnOnce(UnixStream) + Send + 'static) -> DeviceError {
        let dir = tempfile::tempdir().unwrap();
        let device = ProcessDevice {
            name: NAME.to_owned(),
            socket: socket_of(dir.path(), NAME),
        };
        let listener = UnixListener::bind(&device.socket).unwrap();
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        let begun = Instant::now();
        let error = device.status().unwrap_err();
        let limit = Duration::from_secs(6 * ANSWER_SECONDS_MAX);
        assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
        server.join().unwrap();
        error
    }

    #[test]
    fn a_device_that_never_answers_is_not_waited_for_without_end() {
        let error = status_of(|mut stream| {
            // Until the client has gone.
            while stream.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
        });
        assert!(matches!(error, DeviceError::Silent { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(NAME) && text.contains("-KILL"), "{text}");
    }

    #[test]
    fn a_device_that_sends_everybody_away_is_silent() {
        let error = status_of(|mut stream| {
            // All of the question, or the end of the connection is an error.
            stream.read_exact(&mut vec![0; GET_STATUS.len()]).unwrap();
        });
        assert!(matches!(error, DeviceError::Silent { .. }), "{error}");
    }

    #[test]
    fn a_device_that_answers_byte_by_byte_is_not_waited_for_without_end() {
        let error = status_of(|mut stream| {
            let pause = Duration::from_millis(100);
            stream.set_read_timeout(Some(pause)).unwrap();
            while stream.write_all(b"a").is_ok() {
                // The client says no more: this is the pause.
                let _ = stream.read(&mut [0; 64]);
            }
        });
        assert!(matches!(error, DeviceError::Silent { .. }), "{error}");
    }

    #[test]
    fn who_serves_the_socket_and_is_not_our_program_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(socket_of(dir.path(), NAME)).unwrap();
        let error = end_silent(NAME, dir.path()).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        // Where nobody is, nobody has to end.
        end_silent("cmwg-other", dir.path()).unwrap();
    }
}
