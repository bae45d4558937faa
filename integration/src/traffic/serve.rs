//! Servers that say their name and echo.

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};

use super::end_signal;

/// Echo buffer, bytes.
const BUFFER_BYTES: usize = 64 * 1024;

/// Serves on both families until SIGTERM. SIGUSR1 closes the TCP listener and keeps the process.
///
/// A TCP client gets the line `NAME\n`, then an echo of what it sends; a UDP client gets
/// `NAME ` and its datagram.
///
/// # Errors
/// When a port is taken.
pub async fn serve(name: String, tcp: Vec<u16>, udp: Vec<u16>) -> Result<()> {
    let mut end = end_signal()?;
    let mut close = signal(SignalKind::user_defined1())?;
    let mut listeners = tokio::task::JoinSet::new();
    for port in tcp {
        let listener = TcpListener::bind(("::", port))
            .await
            .with_context(|| format!("TCP port {port}"))?;
        listeners.spawn(accept(listener, name.clone()));
    }
    for port in udp {
        let socket = UdpSocket::bind(("::", port))
            .await
            .with_context(|| format!("UDP port {port}"))?;
        tokio::spawn(echo_udp(socket, name.clone()));
    }
    clustermesh_process::notify_ready()?;
    loop {
        tokio::select! {
            _ = end.recv() => return Ok(()),
            _ = close.recv() => listeners.abort_all(),
        }
    }
}

async fn accept(listener: TcpListener, name: String) {
    loop {
        // A connection that is gone before it is accepted is the client's affair.
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream, name.clone()));
        }
    }
}

async fn echo(mut stream: TcpStream, name: String) {
    let _ = stream.set_nodelay(true);
    if stream
        .write_all(format!("{name}\n").as_bytes())
        .await
        .is_err()
    {
        return;
    }
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

async fn echo_udp(socket: UdpSocket, name: String) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let mut answer = format!("{name} ").into_bytes();
            answer.extend_from_slice(&buffer[..length]);
            let _ = socket.send_to(&answer, from).await;
        }
    }
}
