//! gRPC calls by method and outcome, under the names that gRPC servers commonly use, etcd among them.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use clustermesh_api::FILE_DESCRIPTOR_SET;
use http::Response;
use http_body_util::BodyExt;
use prometheus_client::metrics::counter::Counter;
use prost_reflect::{DescriptorPool, MethodDescriptor};
use tonic::body::Body;
use tonic::{Code, Status};

use crate::metrics::{HandledCounters, HandledLabels};

/// gRPC's status codes.
const CODES: usize = 17;

/// Counts calls of the methods of the contract: paths that clients make up are not counted.
#[derive(Debug, Clone)]
pub(super) struct Handled {
    methods: Arc<HashMap<String, Arc<Method>>>,
}

#[derive(Debug)]
struct Method {
    descriptor: MethodDescriptor,
    counters: HandledCounters,
    /// By code, so that a call costs no search for its labels.
    found: [OnceLock<Counter>; CODES],
}

impl Handled {
    /// Reads the contract.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn new(counters: &HandledCounters) -> anyhow::Result<Self> {
        let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET)?;
        let methods = pool
            .services()
            .flat_map(|service| service.methods().collect::<Vec<_>>())
            .map(|descriptor| {
                let service = descriptor.parent_service().full_name().to_owned();
                let method = Method {
                    counters: counters.clone(),
                    found: Default::default(),
                    descriptor,
                };
                let path = format!("/{service}/{}", method.descriptor.name());
                (path, Arc::new(method))
            })
            .collect();
        Ok(Self {
            methods: Arc::new(methods),
        })
    }

    /// Counts the call on `path` once its answer has ended.
    pub(super) fn counted(&self, path: &str) -> Option<Call> {
        let method = Arc::clone(self.methods.get(path)?);
        Some(Call(Some(method)))
    }
}

impl Method {
    fn count(&self, code: Code) {
        if let Some(counter) = self
            .found
            .get(usize::try_from(i32::from(code)).unwrap_or(0))
        {
            counter.get_or_init(|| self.counter(code)).inc();
        }
    }

    fn counter(&self, code: Code) -> Counter {
        let method = &self.descriptor;
        let labels = HandledLabels {
            grpc_type: match (method.is_client_streaming(), method.is_server_streaming()) {
                (false, false) => "unary",
                (true, false) => "client_stream",
                (false, true) => "server_stream",
                (true, true) => "bidi_stream",
            },
            grpc_service: method.parent_service().full_name().to_owned(),
            grpc_method: method.name().to_owned(),
            grpc_code: match code {
                Code::Ok => "OK".to_owned(),
                Code::Cancelled => "Canceled".to_owned(),
                code => format!("{code:?}"),
            },
        };
        self.counters.get_or_create_owned(&labels)
    }
}

/// A call that is under way; one that is dropped was cancelled.
#[derive(Debug)]
pub(super) struct Call(Option<Arc<Method>>);

impl Call {
    /// Whether the client sends one message and no more.
    pub(super) fn takes_one_message(&self) -> bool {
        self.0
            .as_ref()
            .is_some_and(|method| !method.descriptor.is_client_streaming())
    }

    fn end(&mut self, code: Code) {
        if let Some(method) = self.0.take() {
            method.count(code);
        }
    }

    /// The response, whose status is counted when it is sent.
    pub(super) fn follow(mut self, response: Response<Body>) -> Response<Body> {
        if let Some(status) = Status::from_header_map(response.headers()) {
            self.end(status.code());
            return response;
        }
        response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                if let Some(trailers) = frame.trailers_ref() {
                    let status = Status::from_header_map(trailers);
                    self.end(status.map_or(Code::Unknown, |status| status.code()));
                }
                frame
            }))
        })
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_what_they_came_to() {
        let counters = HandledCounters::default();
        let handled = Handled::new(&counters).unwrap();
        assert!(handled.counted("/made.up.Service/Method").is_none());
        let put = "/etcdserverpb.KV/Put";
        let refused = Status::not_found("x").into_http();
        handled.counted(put).unwrap().follow(refused);
        // The client went away before the answer ended.
        let open = Response::new(Body::empty());
        drop(handled.counted(put).unwrap().follow(open));
        let count = |grpc_code: &str| {
            let labels = HandledLabels {
                grpc_type: "unary",
                grpc_service: "etcdserverpb.KV".to_owned(),
                grpc_method: "Put".to_owned(),
                grpc_code: grpc_code.to_owned(),
            };
            counters.get_or_create_owned(&labels).get()
        };
        assert_eq!(
            (count("NotFound"), count("Canceled"), count("OK")),
            (1, 1, 0)
        );
    }
}
