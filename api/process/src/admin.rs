//! HTTP pages `/metrics`, `/health`, `/livez` and `/readyz`, and a listener for them in clear on loopback.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::readiness::Readiness;

/// Connections served at one time; more wait in the kernel's backlog.
pub const MAX_ADMIN_CONNECTIONS: usize = 64;

/// A client must have sent its request head by then.
pub const ADMIN_HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Says why the process is unhealthy, or nothing.
pub type HealthCheck = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The pages; clones share what they show.
#[derive(Clone)]
pub struct AdminPages {
    registry: Arc<Registry>,
    readiness: Readiness,
    health: HealthCheck,
    liveness: HealthCheck,
}

impl fmt::Debug for AdminPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminPages")
            .field("readiness", &self.readiness)
            .finish_non_exhaustive()
    }
}

impl AdminPages {
    /// Pages over `registry`, `readiness` and a health check.
    #[must_use]
    pub fn new(registry: Arc<Registry>, readiness: Readiness, health: HealthCheck) -> Self {
        Self {
            registry,
            readiness,
            health,
            liveness: Arc::new(|| Ok(())),
        }
    }

    /// `/livez` asks `liveness`, which must answer at once: a process that is not live is to be restarted.
    #[must_use]
    pub fn with_liveness(self, liveness: HealthCheck) -> Self {
        Self { liveness, ..self }
    }

    /// What start-up still waits for; empty once the process serves.
    #[must_use]
    pub fn pending(&self) -> Vec<&'static str> {
        self.readiness.pending()
    }

    /// The answer for `path`, or `None` when it is not one of these pages.
    #[must_use]
    pub fn respond(&self, method: &Method, path: &str) -> Option<Response<Full<Bytes>>> {
        let answer = match path {
            "/metrics" => self.metrics(),
            "/health" => self.health(),
            "/readyz" => self.readyz(),
            "/livez" => self.livez(),
            _ => return None,
        };
        if method != Method::GET && method != Method::HEAD {
            return Some(text(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET\n".to_owned(),
            ));
        }
        Some(answer)
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut out = String::new();
        match prometheus_client::encoding::text::encode(&mut out, &self.registry) {
            Ok(()) => typed(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                out,
            ),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    /// etcd's shape: `{"health":"true","reason":""}`.
    fn health(&self) -> Response<Full<Bytes>> {
        match (self.health)() {
            Ok(()) => typed(
                StatusCode::OK,
                "application/json",
                r#"{"health":"true","reason":""}"#.to_owned(),
            ),
            Err(reason) => typed(
                StatusCode::SERVICE_UNAVAILABLE,
                "application/json",
                // A JSON string has the escapes of Rust's debug form for the plain text used here.
                format!(r#"{{"health":"false","reason":{reason:?}}}"#),
            ),
        }
    }

    fn livez(&self) -> Response<Full<Bytes>> {
        match (self.liveness)() {
            Ok(()) => text(StatusCode::OK, "ok\n".to_owned()),
            Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        }
    }

    fn readyz(&self) -> Response<Full<Bytes>> {
        let pending = self.readiness.pending();
        if pending.is_empty() {
            text(StatusCode::OK, "ok\n".to_owned())
        } else {
            text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("waiting for: {}\n", pending.join(", ")),
            )
        }
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", body)
}

fn typed(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The listener.
#[derive(Debug)]
pub struct AdminServer {
    listener: TcpListener,
    pages: AdminPages,
}

impl AdminServer {
    /// Binds `address`; it speaks in clear, so only loopback is accepted.
    ///
    /// # Errors
    /// When the address is not loopback or cannot be bound.
    pub async fn bind(address: SocketAddr, pages: AdminPages) -> std::io::Result<Self> {
        if !address.ip().is_loopback() {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                format!(
                    "{address} is not a loopback address; metrics and health are served in clear, on loopback only"
                ),
            ));
        }
        Ok(Self {
            listener: TcpListener::bind(address).await?,
            pages,
        })
    }

    /// The bound address.
    ///
    /// # Errors
    /// When the socket cannot say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the drain is over: health and metrics are wanted most while a process ends.
    pub async fn serve(self, drain: DrainEnd) {
        let slots = Arc::new(Semaphore::new(MAX_ADMIN_CONNECTIONS));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let stream = tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        warn!(%error, "admin listener");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                () = drain.ended() => return,
            };
            let pages = self.pages.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let answer = pages
                        .respond(request.method(), request.uri().path())
                        .unwrap_or_else(|| text(StatusCode::NOT_FOUND, "not found\n".to_owned()));
                    async move { Ok::<_, Infallible>(answer) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(ADMIN_HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                if let Err(error) = connection.await {
                    debug!(%error, "admin connection");
                }
                drop(slot);
            });
        }
    }
}

/// Ends the admin listener with the drain without holding the drain up.
#[derive(Debug, Clone)]
pub struct DrainEnd(tokio::sync::watch::Receiver<crate::drain::DrainPhase>);

impl DrainEnd {
    /// Follows `drain` without counting as a task of it.
    #[must_use]
    pub fn of(drain: &Drain) -> Self {
        Self(drain.observe())
    }

    async fn ended(&self) {
        let mut phase = self.0.clone();
        // Also ends when the trigger is gone.
        let _ = phase
            .wait_for(|phase| *phase >= crate::drain::DrainPhase::Forced)
            .await;
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn pages(readiness: &Readiness, health: Result<(), String>) -> AdminPages {
        let mut registry = Registry::default();
        let counter = Counter::<u64>::default();
        counter.inc_by(3);
        registry.register("test_events", "events", counter);
        AdminPages::new(
            Arc::new(registry),
            readiness.clone(),
            Arc::new(move || health.clone()),
        )
    }

    async fn get(pages: &AdminPages, path: &str) -> (StatusCode, String) {
        let response = pages.respond(&Method::GET, path).unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn pages_show_metrics_health_and_what_readiness_waits_for() {
        let readiness = Readiness::new();
        let token = readiness.token("store");
        let pages = pages(&readiness, Err("no \"quorum\"".into()));
        assert!(
            get(&pages, "/metrics")
                .await
                .1
                .contains("test_events_total 3")
        );
        assert_eq!(
            get(&pages, "/readyz").await,
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "waiting for: store\n".to_owned()
            )
        );
        drop(token);
        assert_eq!(get(&pages, "/readyz").await.0, StatusCode::OK);
        assert_eq!(
            get(&pages, "/health").await,
            (
                StatusCode::SERVICE_UNAVAILABLE,
                r#"{"health":"false","reason":"no \"quorum\""}"#.to_owned()
            )
        );
        assert_eq!(get(&pages, "/livez").await.0, StatusCode::OK);
        let stuck = pages.clone().with_liveness(Arc::new(|| {
            Err("main loop has been stuck for 61 s".to_owned())
        }));
        assert_eq!(
            get(&stuck, "/livez").await,
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "main loop has been stuck for 61 s\n".to_owned()
            )
        );
        assert!(pages.respond(&Method::GET, "/other").is_none());
        assert_eq!(
            pages.respond(&Method::POST, "/health").unwrap().status(),
            StatusCode::METHOD_NOT_ALLOWED
        );
    }

    #[tokio::test]
    async fn the_listener_answers_on_loopback_and_refuses_other_addresses() {
        let pages = pages(&Readiness::new(), Ok(()));
        let error = AdminServer::bind("0.0.0.0:0".parse().unwrap(), pages.clone())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("loopback"));
        let server = AdminServer::bind("127.0.0.1:0".parse().unwrap(), pages)
            .await
            .unwrap();
        let address = server.local_addr().unwrap();
        let (trigger, drain) = crate::drain::drain();
        let task = tokio::spawn(server.serve(DrainEnd::of(&drain)));
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.ends_with(r#"{"health":"true","reason":""}"#),
            "{answer}"
        );
        drop(drain);
        assert!(trigger.drain(Duration::from_secs(5)).await);
        task.await.unwrap();
    }
}
