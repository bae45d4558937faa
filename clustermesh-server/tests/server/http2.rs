//! HTTP/2 by the byte, for clients that no library would be.

use std::io;
use std::net::SocketAddr;

use clustermesh_process::TlsPaths;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::support::tls_stream;

/// What a client begins with.
pub const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// Type of a frame.
pub const HTTP2_PING: u8 = 6;
/// Flag of an answer.
pub const HTTP2_ACK: u8 = 1;

/// A connection that has begun with HTTP/2.
pub async fn http2(address: SocketAddr, tls: &TlsPaths) -> TlsStream<TcpStream> {
    let mut stream = tls_stream(address, tls, b"h2").await;
    stream.write_all(HTTP2_PREFACE).await.unwrap();
    stream.write_all(&EMPTY_SETTINGS).await.unwrap();
    stream
}

/// One HTTP/2 frame: type, flags, payload.
pub async fn frame(stream: &mut TlsStream<TcpStream>) -> io::Result<(u8, u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut payload).await?;
    Ok((head[3], head[4], payload))
}

/// Reads until the server closes.
pub async fn closed(mut stream: impl tokio::io::AsyncRead + Unpin) {
    let mut buffer = [0; 4096];
    while let Ok(1..) = stream.read(&mut buffer).await {}
}
