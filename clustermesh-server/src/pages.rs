//! Plain HTTP pages of the client port, with etcd's paths, parameters and texts: version, health, liveness, readiness, metrics.

use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::AlarmType;
use clustermesh_process::AdminPages;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;

use crate::auth::Caller;
use crate::store::Store;
use crate::version::version_json;

/// A check that reads waits so long for the group (etcd's request timeout).
const CHECK_TIMEOUT: Duration = Duration::from_secs(7);

/// The checks of `/livez`.
const LIVEZ: &[Check] = &[Check::SerializableRead];
/// The checks of `/readyz`.
const READYZ: &[Check] = &[
    Check::DataCorruption,
    Check::SerializableRead,
    Check::LinearizableRead,
    Check::NonLearner,
    Check::Startup,
];

/// The pages.
#[derive(Debug, Clone)]
pub struct Pages {
    store: Store,
    admin: AdminPages,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
    /// Everything that the process must have done before it serves.
    Startup,
}

impl Check {
    const fn name(self) -> &'static str {
        match self {
            Self::DataCorruption => "data_corruption",
            Self::SerializableRead => "serializable_read",
            Self::LinearizableRead => "linearizable_read",
            Self::NonLearner => "non_learner",
            Self::Startup => "startup",
        }
    }
}

impl Pages {
    /// Over `store`; metrics and start-up come from `admin`.
    #[must_use]
    pub fn new(store: Store, admin: AdminPages) -> Self {
        Self { store, admin }
    }

    /// The answer, or `None` when the path is none of these pages.
    pub async fn respond<B>(
        &self,
        caller: &Caller,
        request: &Request<B>,
    ) -> Option<Response<Full<Bytes>>> {
        let path = request.uri().path();
        let query = Query(request.uri().query().unwrap_or_default());
        let (checks, name): (&[Check], _) = match path.strip_prefix('/')?.split_once('/') {
            Some(("livez", name)) => (LIVEZ, Some(name)),
            Some(("readyz", name)) => (READYZ, Some(name)),
            Some(_) => return None,
            None if path == "/livez" => (LIVEZ, None),
            None if path == "/readyz" => (READYZ, None),
            None if matches!(path, "/version" | "/health" | "/metrics") => (&[], None),
            None => return None,
        };
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut response = text(
                StatusCode::METHOD_NOT_ALLOWED,
                "Method Not Allowed\n".to_owned(),
            );
            response
                .headers_mut()
                .insert(header::ALLOW, HeaderValue::from_static("GET"));
            return Some(response);
        }
        Some(match (path, name) {
            ("/version", _) => typed(StatusCode::OK, "application/json", version_json()),
            ("/health", _) => self.health(&query).await,
            ("/metrics", _) => self.metrics(caller),
            (_, Some(name)) => {
                let check = checks.iter().find(|check| check.name() == name)?;
                self.checks(&[*check], &query).await
            }
            (_, None) => self.checks(checks, &query).await,
        })
    }

    /// Metrics name peers and nodes: not everyone with a certificate may read them.
    fn metrics(&self, caller: &Caller) -> Response<Full<Bytes>> {
        if caller.check_operator().is_err() {
            return text(
                StatusCode::FORBIDDEN,
                "metrics on this port are for an operator's certificate; on the machine itself they are in clear on listen_admin\n".to_owned(),
            );
        }
        self.admin
            .respond(&Method::GET, "/metrics")
            .unwrap_or_else(|| text(StatusCode::NOT_FOUND, "not found\n".to_owned()))
    }

    /// `{"health":"true","reason":""}`, as etcd says it.
    async fn health(&self, query: &Query<'_>) -> Response<Full<Bytes>> {
        let serializable = query.get("serializable").any(|value| value == "true");
        let found = self.judge(serializable, query).await;
        let (status, health) = if found.is_ok() {
            (StatusCode::OK, "true")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "false")
        };
        let body = serde_json::json!({
            "health": health,
            "reason": found.err().unwrap_or_default(),
        });
        typed(status, "application/json", body.to_string())
    }

    /// etcd's names of the alarms that stand on any replica.
    fn alarms(&self) -> Vec<&'static str> {
        self.store.read(|state| {
            state
                .alarms()
                .map(|alarm| {
                    AlarmType::try_from(alarm.kind).map_or("UNKNOWN", |kind| kind.as_str_name())
                })
                .collect()
        })
    }

    async fn judge(&self, serializable: bool, query: &Query<'_>) -> Result<(), String> {
        for alarm in self.alarms() {
            if !query.get("exclude").any(|name| name == alarm) {
                return Err(format!("ALARM {alarm}"));
            }
        }
        if !serializable && self.store.check_leader().is_err() {
            return Err("RAFT NO LEADER".to_owned());
        }
        self.read(serializable)
            .await
            .map_err(|error| format!("RANGE ERROR:{error}"))
    }

    async fn read(&self, serializable: bool) -> Result<(), String> {
        if let Some(failure) = self.store.replica().status().failure {
            return Err(format!("replica stopped: {failure}"));
        }
        if serializable {
            self.store.read(clustermesh_core::State::revision);
            return Ok(());
        }
        match tokio::time::timeout(CHECK_TIMEOUT, self.store.linearize()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err("etcdserver: request timed out".to_owned()),
        }
    }

    async fn checks(&self, checks: &[Check], query: &Query<'_>) -> Response<Full<Bytes>> {
        let mut report = String::new();
        let mut failed = false;
        for check in checks {
            if query.get("exclude").any(|name| name == check.name()) {
                continue;
            }
            match self.run(*check).await {
                Ok(()) => report += &format!("[+]{} ok\n", check.name()),
                Err(reason) => {
                    failed = true;
                    report += &format!("[-]{} failed: {reason}\n", check.name());
                }
            }
        }
        if failed {
            return text(StatusCode::SERVICE_UNAVAILABLE, report);
        }
        if query.get("verbose").next().is_none() {
            report.clear();
        }
        text(StatusCode::OK, report + "ok\n")
    }

    async fn run(&self, check: Check) -> Result<(), String> {
        match check {
            Check::SerializableRead => self.read(true).await,
            Check::LinearizableRead => self.read(false).await,
            Check::DataCorruption => {
                if self.alarms().contains(&"CORRUPT") {
                    return Err("alarm activated: CORRUPT".to_owned());
                }
                Ok(())
            }
            Check::NonLearner => {
                if self.store.is_learner() {
                    return Err("not supported for learner".to_owned());
                }
                Ok(())
            }
            Check::Startup => {
                let pending = self.admin.pending();
                if pending.is_empty() {
                    return Ok(());
                }
                Err(format!("waiting for: {}", pending.join(", ")))
            }
        }
    }
}

/// A query string. Values that matter here need no escapes.
struct Query<'a>(&'a str);

impl<'a> Query<'a> {
    /// The values given for `name`; empty for one without `=`.
    fn get(&self, name: &'static str) -> impl Iterator<Item = &'a str> {
        self.0.split('&').filter_map(move |pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then_some(value)
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_with_and_without_values() {
        let query = Query("verbose&exclude=a&exclude=b&serializable=true");
        assert_eq!(query.get("verbose").collect::<Vec<_>>(), [""]);
        assert_eq!(query.get("exclude").collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(query.get("serializable").collect::<Vec<_>>(), ["true"]);
        assert_eq!(Query("").get("verbose").count(), 0);
    }
}
