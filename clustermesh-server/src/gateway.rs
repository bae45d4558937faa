//! etcd's JSON gateway: `POST /v3/…` with JSON bodies, answered by the gRPC services of this process under the caller's own rights.

mod frames;
mod json;
mod methods;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::ServiceExt;

use self::frames::Frames;
pub use self::json::Objects;
pub use self::methods::{Method as GatewayMethod, Methods};
use crate::answers::{AnswerBudget, Reservation};
use crate::auth::Caller;

/// Where all paths begin.
pub const PREFIX: &str = "/v3/";
/// JSON of one request: a gRPC request in base64, with room for its names.
const MAX_REQUEST_JSON_BYTES: usize = 3 << 20;
/// Messages of a stream made ahead of what the other side takes.
const STREAM_QUEUE_MESSAGES: usize = 2;
/// What an answer takes in memory, as a multiple of its protobuf: the decoded message and its JSON.
const ANSWER_BYTES_FACTOR: usize = 6;

/// The gateway; clones share the descriptors.
#[derive(Debug, Clone)]
pub struct Gateway {
    methods: Arc<Methods>,
    answers: AnswerBudget,
    /// A request, or the first one of a stream, must have arrived by then.
    request_timeout: Duration,
}

type RequestFrames = mpsc::Sender<Result<Frame<Bytes>, std::convert::Infallible>>;

impl Gateway {
    /// Reads the contract; requests and answers live on `answers`. A request must have arrived within `request_timeout`.
    ///
    /// # Errors
    /// When the contract lacks a method.
    pub fn new(answers: AnswerBudget, request_timeout: Duration) -> anyhow::Result<Self> {
        Ok(Self {
            methods: Arc::new(Methods::load()?),
            answers,
            request_timeout,
        })
    }

    /// Answers a request below [`PREFIX`].
    pub async fn answer(
        &self,
        routes: &Routes,
        caller: Arc<Caller>,
        request: Request<Incoming>,
    ) -> Response<Body> {
        self.call(routes, caller, request)
            .await
            .unwrap_or_else(|status| failed(&status))
    }

    async fn call(
        &self,
        routes: &Routes,
        caller: Arc<Caller>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Status> {
        let method = request
            .uri()
            .path()
            .strip_prefix(PREFIX)
            .and_then(|path| self.methods.get(path))
            .ok_or_else(|| Status::not_found("Not Found"))?
            .clone();
        if request.method() != Method::POST {
            return Err(Status::unimplemented("Method Not Allowed"));
        }
        let (head, body) = request.into_parts();
        let (reservation, body) = if method.descriptor.is_client_streaming() {
            let reservation = self.answers.reserve(MAX_REQUEST_JSON_BYTES)?;
            let streamed = streamed(&method, body, self.request_timeout).await?;
            (reservation, streamed)
        } else {
            let reservation = self.answers.reserve(expected_bytes(&head.headers))?;
            let json = whole(body, self.request_timeout).await?;
            let message = method.request(&json)?;
            (reservation, Body::new(Full::new(frames::frame(&message))))
        };
        let mut call = Request::new(body);
        *call.method_mut() = Method::POST;
        *call.version_mut() = http::Version::HTTP_2;
        *call.uri_mut() = http::Uri::try_from(method.path.as_str())
            .map_err(|error| Status::internal(error.to_string()))?;
        *call.headers_mut() = forwarded(&head.headers);
        call.extensions_mut().insert(caller);
        let response = match routes.clone().oneshot(call).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        if let Some(status) = Status::from_header_map(response.headers())
            && status.code() != Code::Ok
        {
            return Err(status);
        }
        if method.descriptor.is_server_streaming() {
            return Ok(self.stream(&method, reservation, response));
        }
        self.unary(&method, response).await
    }

    async fn unary(
        &self,
        method: &methods::Method,
        mut response: Response<Body>,
    ) -> Result<Response<Body>, Status> {
        // Held until the answer was turned into JSON, whose own share replaces it.
        let _taken = response.extensions_mut().remove::<Arc<Reservation>>();
        let mut frames = Frames::default();
        let mut body = response.into_body();
        let mut message = None;
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(bytes) => frames.push(&bytes),
                Err(frame) => trailers_status(frame.trailers_ref())?,
            }
            if let Some(found) = frames.next()? {
                message = Some(found);
            }
        }
        let message = message.ok_or_else(|| Status::internal("clustermesh: no answer"))?;
        let reservation = self
            .answers
            .reserve(message.len().saturating_mul(ANSWER_BYTES_FACTOR))?;
        let json = json::from_protobuf(&method.descriptor.output(), message, false)?;
        let length = json.len();
        let mut response = respond(StatusCode::OK, Body::new(Full::new(Bytes::from(json))));
        // The body that holds its share of the budget does not tell its length.
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        response.extensions_mut().insert(reservation);
        Ok(response)
    }

    /// Every message as one line, an error as the last one.
    fn stream(
        &self,
        method: &methods::Method,
        reservation: Arc<Reservation>,
        response: Response<Body>,
    ) -> Response<Body> {
        let (lines, stream) = mpsc::channel(STREAM_QUEUE_MESSAGES);
        let output = method.descriptor.output();
        tokio::spawn(async move {
            // The shares of the service and of the request last as long as the stream.
            let (head, mut body) = response.into_parts();
            let _held = (head.extensions, reservation);
            let mut frames = Frames::default();
            loop {
                let next = tokio::select! {
                    next = next_line(&output, &mut frames, &mut body) => next,
                    () = lines.closed() => return,
                };
                let line = match next {
                    Ok(Some(line)) => line,
                    Ok(None) => return,
                    Err(status) => {
                        let _ = lines.send(json::error(&status, true)).await;
                        return;
                    }
                };
                if lines.send(line).await.is_err() {
                    return;
                }
            }
        });
        let body = StreamBody::new(
            ReceiverStream::new(stream).map(|line| Ok::<_, Status>(Frame::data(Bytes::from(line)))),
        );
        respond(StatusCode::OK, Body::new(body))
    }
}

async fn next_line(
    output: &prost_reflect::MessageDescriptor,
    frames: &mut Frames,
    body: &mut Body,
) -> Result<Option<Vec<u8>>, Status> {
    loop {
        if let Some(message) = frames.next()? {
            return json::from_protobuf(output, message, true).map(Some);
        }
        let Some(frame) = body.frame().await else {
            return Ok(None);
        };
        match frame?.into_data() {
            Ok(bytes) => frames.push(&bytes),
            Err(frame) => trailers_status(frame.trailers_ref())?,
        }
    }
}

fn trailers_status(trailers: Option<&HeaderMap>) -> Result<(), Status> {
    match trailers.and_then(Status::from_header_map) {
        Some(status) if status.code() != Code::Ok => Err(status),
        _ => Ok(()),
    }
}

/// What a request will take, by its own word.
fn expected_bytes(headers: &HeaderMap) -> usize {
    headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse().ok())
        .map_or(MAX_REQUEST_JSON_BYTES, |length: usize| {
            length.min(MAX_REQUEST_JSON_BYTES)
        })
}

async fn whole(body: Incoming, within: Duration) -> Result<Bytes, Status> {
    let limited = http_body_util::Limited::new(body, MAX_REQUEST_JSON_BYTES).collect();
    match tokio::time::timeout(within, limited).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(Status::resource_exhausted(format!(
                "clustermesh: a request of more than {MAX_REQUEST_JSON_BYTES} bytes of JSON; send smaller ones"
            )))
        }
        Ok(Err(error)) => Err(Status::cancelled(error.to_string())),
        Err(_) => Err(late(within)),
    }
}

fn late(within: Duration) -> Status {
    Status::deadline_exceeded(format!(
        "clustermesh: the request did not arrive within {within:?}"
    ))
}

/// The requests of a stream, as they come. The first must be right; a wrong or a late one afterwards ends them.
async fn streamed(
    method: &methods::Method,
    mut body: Incoming,
    within: Duration,
) -> Result<Body, Status> {
    let input = method.descriptor.input();
    let mut objects = Objects::default();
    let first = tokio::time::timeout(within, next_object(&mut objects, &mut body))
        .await
        .map_err(|_| late(within))??;
    let (messages, stream): (RequestFrames, _) = mpsc::channel(STREAM_QUEUE_MESSAGES);
    let mut next = match first {
        Some(object) => json::to_protobuf(&input, &object)?,
        None => return Ok(Body::empty()),
    };
    tokio::spawn(async move {
        loop {
            let frame = Frame::data(frames::frame(&next));
            if messages.send(Ok(frame)).await.is_err() {
                return;
            }
            let object = tokio::select! {
                object = next_in_time(&mut objects, &mut body, within) => object,
                () = messages.closed() => return,
            };
            let message = match object {
                Ok(Some(object)) => json::to_protobuf(&input, &object),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            match message {
                Ok(message) => next = message,
                Err(status) => {
                    tracing::debug!(%status, "request stream of the gateway");
                    return;
                }
            }
        }
    });
    Ok(Body::new(StreamBody::new(ReceiverStream::new(stream))))
}

async fn next_object<B>(objects: &mut Objects, body: &mut B) -> Result<Option<Bytes>, Status>
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    loop {
        if let Some(object) = objects.next_object()? {
            return Ok(Some(object));
        }
        if !take_frame(objects, body).await? {
            return Ok(None);
        }
    }
}

/// The next object of a stream that may be quiet between objects, but not within one.
async fn next_in_time<B>(
    objects: &mut Objects,
    body: &mut B,
    within: Duration,
) -> Result<Option<Bytes>, Status>
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    loop {
        if let Some(object) = objects.next_object()? {
            return Ok(Some(object));
        }
        if objects.is_open() {
            return tokio::time::timeout(within, next_object(objects, body))
                .await
                .map_err(|_| late(within))?;
        }
        if !take_frame(objects, body).await? {
            return Ok(None);
        }
    }
}

/// False at the end.
async fn take_frame<B>(objects: &mut Objects, body: &mut B) -> Result<bool, Status>
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    match body.frame().await {
        Some(Ok(frame)) => {
            if let Ok(bytes) = frame.into_data() {
                objects.push(&bytes, MAX_REQUEST_JSON_BYTES)?;
            }
            Ok(true)
        }
        Some(Err(error)) => Err(Status::cancelled(error.to_string())),
        None if objects.is_open() => Err(Status::invalid_argument("unexpected EOF")),
        None => Ok(false),
    }
}

/// The headers that grpc-gateway passes on as metadata.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let mut metadata = HeaderMap::new();
    metadata.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    metadata.insert(header::TE, HeaderValue::from_static("trailers"));
    for (name, value) in headers {
        let name = match name.as_str() {
            "authorization" => "authorization",
            name => match name.strip_prefix("grpc-metadata-") {
                Some(name) => name,
                None => continue,
            },
        };
        if let Ok(name) = http::HeaderName::try_from(name) {
            metadata.append(name, value.clone());
        }
    }
    metadata
}

fn failed(status: &Status) -> Response<Body> {
    let code =
        StatusCode::from_u16(json::http_status(status.code())).unwrap_or(StatusCode::BAD_GATEWAY);
    respond(
        code,
        Body::new(Full::new(Bytes::from(json::error(status, false)))),
    )
}

fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[tokio::test]
    async fn a_stream_may_be_quiet_between_objects_and_not_within_one() {
        const WITHIN: Duration = Duration::from_millis(200);
        let (sender, pieces) = mpsc::channel::<&'static str>(8);
        let mut body =
            StreamBody::new(ReceiverStream::new(pieces).map(|piece| {
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(piece.as_bytes())))
            }));
        let mut objects = Objects::default();
        let mut next = async || next_in_time(&mut objects, &mut body, WITHIN).await;
        for piece in ["{\"a\"", ":1}  ", "{} "] {
            sender.send(piece).await.unwrap();
        }
        assert_eq!(next().await.unwrap().unwrap(), "{\"a\":1}");
        assert_eq!(next().await.unwrap().unwrap().trim_ascii(), b"{}");
        let quiet = tokio::time::timeout(3 * WITHIN, next()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        let dripping = async {
            sender.send("{\"b\":\"").await.unwrap();
            loop {
                sender.send("x").await.unwrap();
                tokio::time::sleep(WITHIN / 8).await;
            }
        };
        let begun = tokio::time::Instant::now();
        let late = tokio::select! {
            () = dripping => unreachable!(),
            next = next() => next,
        };
        assert_eq!(late.unwrap_err().code(), Code::DeadlineExceeded);
        assert!(begun.elapsed() >= WITHIN);
    }
}
