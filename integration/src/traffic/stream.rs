//! One established connection that must live through whatever happens around it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::end_signal;

/// Least bytes of one message: its number.
const MESSAGE_BYTES_MIN: usize = 8;

/// What became of the connection.
#[derive(Debug, Serialize)]
pub struct StreamReport {
    /// Messages that came back.
    pub echoed: u64,
    /// Whether the connection was reset or closed.
    pub broken: bool,
    /// Why.
    pub error: Option<String>,
    /// Longest time from sending a message to its echo.
    pub echo_ms_max: f64,
}

/// Opens one connection, exchanges a message of `message_bytes` every `every`, and reports on SIGTERM or when it breaks.
///
/// # Errors
/// When the connection cannot be opened.
pub async fn stream(to: SocketAddr, every: Duration, message_bytes: usize) -> Result<StreamReport> {
    let message_bytes = message_bytes.max(MESSAGE_BYTES_MIN);
    let mut end = end_signal()?;
    let connection = TcpStream::connect(to)
        .await
        .with_context(|| format!("connect to {to}"))?;
    connection.set_nodelay(true)?;
    let mut connection = BufReader::new(connection);
    let mut name = String::new();
    connection.read_line(&mut name).await?;
    clustermesh_process::notify_ready()?;
    let mut report = StreamReport {
        echoed: 0,
        broken: false,
        error: None,
        echo_ms_max: 0.0,
    };
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let exchange = async {
            ticks.tick().await;
            let begun = Instant::now();
            exchange_one(&mut connection, report.echoed, message_bytes).await?;
            std::io::Result::Ok(begun.elapsed())
        };
        tokio::select! {
            _ = end.recv() => return Ok(report),
            result = exchange => match result {
                Ok(took) => {
                    report.echoed += 1;
                    report.echo_ms_max = report.echo_ms_max.max(took.as_secs_f64() * 1e3);
                }
                Err(error) => {
                    report.broken = true;
                    report.error = Some(error.to_string());
                    end.recv().await;
                    return Ok(report);
                }
            }
        }
    }
}

async fn exchange_one(
    connection: &mut BufReader<TcpStream>,
    number: u64,
    message_bytes: usize,
) -> std::io::Result<()> {
    let mut message = vec![0; message_bytes];
    message[..8].copy_from_slice(&number.to_be_bytes());
    connection.write_all(&message).await?;
    let mut answer = vec![0; message_bytes];
    connection.read_exact(&mut answer).await?;
    if answer == message {
        Ok(())
    } else {
        Err(std::io::Error::other("the echo differs"))
    }
}
