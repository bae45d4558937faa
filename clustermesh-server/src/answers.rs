//! Bytes of answers that clients have not taken yet: bounded over all connections, so that readers who do not read cannot exhaust memory.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::body::Body;
use tonic::{Response, Status};

use crate::metrics::AnswerMetrics;

/// Answers up to this size have a budget of their own: a few huge answers that nobody reads never block the small ones.
pub const SMALL_ANSWER_BYTES: usize = 64 << 10;
/// What is smaller costs less than the stream that it is sent on, which has limits of its own.
pub const UNCOUNTED_ANSWER_BYTES: usize = 1 << 10;
/// Small answers that are under way.
pub const MAX_SMALL_ANSWERS_BYTES: usize = 128 << 20;
/// Large answers that are under way; one that is larger than this waits for no other and has the budget alone.
pub const MAX_LARGE_ANSWERS_BYTES: usize = 512 << 20;
/// What one counted unit of the budget stands for.
const UNIT_BYTES: usize = 1 << 10;

/// The budget; clones share it.
#[derive(Debug, Clone)]
pub struct AnswerBudget {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    metrics: AnswerMetrics,
}

/// A share of the budget; given back when the last byte has left.
#[derive(Debug)]
pub struct Reservation {
    _permit: OwnedSemaphorePermit,
    bytes: i64,
    metrics: AnswerMetrics,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.metrics.bytes.dec_by(self.bytes);
    }
}

impl AnswerBudget {
    /// The whole budget, unused.
    #[must_use]
    pub fn new(metrics: AnswerMetrics) -> Self {
        Self {
            small: Arc::new(Semaphore::new(MAX_SMALL_ANSWERS_BYTES / UNIT_BYTES)),
            large: Arc::new(Semaphore::new(MAX_LARGE_ANSWERS_BYTES / UNIT_BYTES)),
            metrics,
        }
    }

    /// Takes `bytes` of the budget.
    ///
    /// # Errors
    /// `ResourceExhausted` when the answers under way leave too little.
    pub fn reserve(&self, bytes: usize) -> Result<Arc<Reservation>, Status> {
        let (pool, whole) = if bytes <= SMALL_ANSWER_BYTES {
            (&self.small, MAX_SMALL_ANSWERS_BYTES)
        } else {
            (&self.large, MAX_LARGE_ANSWERS_BYTES)
        };
        let units = bytes.min(whole).div_ceil(UNIT_BYTES);
        let permit = u32::try_from(units)
            .ok()
            .and_then(|units| Arc::clone(pool).try_acquire_many_owned(units).ok());
        let Some(permit) = permit else {
            self.metrics.refused.inc();
            return Err(Status::resource_exhausted(format!(
                "clustermesh: {} bytes of answers wait for clients to take them, no room for {bytes} more; retry, or read in pages (limit)",
                self.metrics.bytes.get()
            )));
        };
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.metrics.bytes.inc_by(bytes);
        Ok(Arc::new(Reservation {
            _permit: permit,
            bytes,
            metrics: self.metrics.clone(),
        }))
    }

    /// `message` as a response that holds its share of the budget until it has been sent.
    ///
    /// # Errors
    /// As [`AnswerBudget::reserve`].
    pub fn answer<T: prost::Message>(&self, message: T) -> Result<Response<T>, Status> {
        let bytes = message.encoded_len();
        let mut response = Response::new(message);
        if bytes <= UNCOUNTED_ANSWER_BYTES {
            return Ok(response);
        }
        let reservation = self.reserve(bytes)?;
        response.extensions_mut().insert(reservation);
        Ok(response)
    }
}

/// A piece of an answer with the share of the budget that it lives on.
struct Counted {
    bytes: Bytes,
    _reservation: Arc<Reservation>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Ties the share that a service put beside its answer to the bytes themselves: the transport keeps them after the body is gone.
pub fn hold_until_sent(mut response: http::Response<Body>) -> http::Response<Body> {
    let Some(reservation) = response.extensions_mut().remove::<Arc<Reservation>>() else {
        return response;
    };
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            frame.map_data(|bytes| {
                Bytes::from_owner(Counted {
                    bytes,
                    _reservation: Arc::clone(&reservation),
                })
            })
        }))
    })
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    #[test]
    fn answers_past_the_budget_are_refused_and_counted_until_one_is_gone() {
        let metrics = AnswerMetrics::default();
        let budget = AnswerBudget::new(metrics.clone());
        let half = budget.reserve(MAX_LARGE_ANSWERS_BYTES / 2).unwrap();
        let other = budget.reserve(MAX_LARGE_ANSWERS_BYTES / 2).unwrap();
        let refused = budget.reserve(SMALL_ANSWER_BYTES + 1).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(refused.message().contains("limit"), "{refused}");
        assert_eq!(metrics.refused.get(), 1);
        assert!(
            budget.reserve(SMALL_ANSWER_BYTES).is_ok(),
            "small ones go on"
        );
        drop(half);
        assert!(budget.reserve(SMALL_ANSWER_BYTES + 1).is_ok());
        drop(other);
        assert_eq!(metrics.bytes.get(), 0);
    }

    #[test]
    fn an_answer_larger_than_the_budget_has_it_alone() {
        let budget = AnswerBudget::new(AnswerMetrics::default());
        let huge = budget.reserve(3 * MAX_LARGE_ANSWERS_BYTES).unwrap();
        assert!(budget.reserve(SMALL_ANSWER_BYTES + 1).is_err());
        drop(huge);
        assert!(budget.reserve(SMALL_ANSWER_BYTES + 1).is_ok());
    }

    #[tokio::test]
    async fn a_share_is_held_by_the_bytes_not_by_the_body() {
        let metrics = AnswerMetrics::default();
        let budget = AnswerBudget::new(metrics.clone());
        let mut response = http::Response::new(Body::new(Full::new(Bytes::from_static(b"abc"))));
        response
            .extensions_mut()
            .insert(budget.reserve(2000).unwrap());
        let mut body = hold_until_sent(response).into_body();
        let bytes = body.frame().await.unwrap().unwrap().into_data().unwrap();
        drop(body);
        assert_eq!((&bytes[..], metrics.bytes.get()), (&b"abc"[..], 2000));
        drop(bytes);
        assert_eq!(metrics.bytes.get(), 0);
    }
}
