//! The network between replicas: delays, lost connections, cuts in one or both directions, repeated questions where a repeat is harmless.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use clustermesh_raft::{
    PeerHandler, Target, Transport, TransportError,
    wire::{
        AppendRequest, AppendResponse, CallRequest, CallResponse, SnapshotPart, call_request::Call,
    },
};
use futures_util::{
    StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use openraft::async_runtime::AsyncRuntime;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::runtime::{Life, SimRuntime, current_life, draw, elapsed, spawn_in, trace};

/// Messages of one stream on their way.
const MAX_IN_FLIGHT: usize = 64;
/// What a broken connection is noticed after, ms.
const BREAK_MS: u64 = 2000;

/// How bad it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Of 100 messages, so many are lost, and their connection with them.
    pub loss_percent: u64,
    /// Of 100 questions, so many are asked twice.
    pub repeat_percent: u64,
    /// The longest delay of a message, ms.
    pub delay_ms: u64,
}

#[derive(Default)]
struct Inner {
    listeners: BTreeMap<String, (PeerHandler<SimRuntime>, Life)>,
    /// Direction by direction.
    cut: BTreeSet<(String, String)>,
    weather: Weather,
}

/// All connections.
#[derive(Clone, Default)]
pub struct Network(Arc<Mutex<Inner>>);

impl Network {
    /// A replica takes messages at `url` from now on.
    pub fn listen(&self, url: &str, handler: PeerHandler<SimRuntime>, life: Life) {
        let old = self
            .0
            .lock()
            .listeners
            .insert(url.to_owned(), (handler, life));
        drop(old);
    }

    /// Nobody is at `url` any more.
    pub fn silence(&self, url: &str) {
        let old = self.0.lock().listeners.remove(url);
        drop(old);
    }

    /// Cuts one direction.
    pub fn cut(&self, from: &str, to: &str) {
        self.0.lock().cut.insert((from.to_owned(), to.to_owned()));
    }

    /// Everything works again.
    pub fn heal(&self) {
        self.0.lock().cut.clear();
    }

    /// Changes the weather.
    pub fn set_weather(&self, weather: Weather) {
        self.0.lock().weather = weather;
    }

    /// The sending end at `url`.
    pub fn transport(&self, url: &str) -> Arc<dyn Transport> {
        Arc::new(Link {
            network: self.clone(),
            own: url.to_owned(),
        })
    }

    fn passes(&self, from: &str, to: &str) -> bool {
        let inner = self.0.lock();
        let cut = inner.cut.contains(&(from.to_owned(), to.to_owned()));
        let loss = inner.weather.loss_percent;
        !cut && !draw(|random| random.chance(loss))
    }

    fn delay(&self) -> Duration {
        let delay_ms = self.0.lock().weather.delay_ms;
        draw(|random| {
            // Mostly quick, now and then slow.
            let most = if random.chance(90) {
                delay_ms / 8
            } else {
                delay_ms
            };
            random.time_ms(0..most + 1)
        })
    }

    fn listener(&self, url: &str) -> Option<(PeerHandler<SimRuntime>, Life)> {
        self.0.lock().listeners.get(url).cloned()
    }
}

#[derive(Clone)]
struct Link {
    network: Network,
    own: String,
}

fn unreachable(peer: &str) -> TransportError {
    TransportError::Unreachable {
        peer: peer.to_owned(),
        reason: "nobody answers".into(),
    }
}

fn broken(peer: &str) -> TransportError {
    TransportError::Broken {
        peer: peer.to_owned(),
        reason: "a message was lost".into(),
    }
}

async fn break_after() {
    SimRuntime::sleep(draw(|random| random.time_ms(1..BREAK_MS))).await;
}

impl Link {
    /// Brings one message to `to`.
    async fn bring(&self, to: &str) -> Result<(PeerHandler<SimRuntime>, Life), TransportError> {
        SimRuntime::sleep(self.network.delay()).await;
        if !self.network.passes(&self.own, to) {
            break_after().await;
            // Whoever sends cannot tell how far it came, unless no connection could be made.
            return Err(if draw(|random| random.chance(50)) {
                unreachable(to)
            } else {
                broken(to)
            });
        }
        self.network.listener(to).ok_or_else(|| unreachable(to))
    }

    /// Brings the answer back.
    async fn bring_back<T>(
        &self,
        from: &str,
        answer: impl Future<Output = Option<T>>,
    ) -> Result<T, TransportError> {
        let answer = answer.await;
        SimRuntime::sleep(self.network.delay()).await;
        match answer {
            Some(answer) if self.network.passes(from, &self.own) => Ok(answer),
            _ => {
                break_after().await;
                Err(broken(from))
            }
        }
    }

    /// Carries a stream from this end, in order, until a message is lost or either end is gone.
    fn carry<T: Send + 'static>(
        &self,
        from: &str,
        to: &str,
        mut items: BoxStream<'static, T>,
        ended: oneshot::Receiver<()>,
    ) -> BoxStream<'static, T> {
        let (sender, receiver) = mpsc::channel::<(Duration, T)>(MAX_IN_FLIGHT);
        let (network, from, to) = (self.network.clone(), from.to_owned(), to.to_owned());
        let pump = async move {
            // Time of the world: the ends have clocks of their own.
            let mut last = elapsed();
            while let Some(item) = items.next().await {
                if !network.passes(&from, &to) {
                    break_after().await;
                    return;
                }
                last = last.max(elapsed() + network.delay());
                if sender.send((last, item)).await.is_err() {
                    return;
                }
            }
        };
        drop(spawn_in(current_life(), async move {
            let _either = SimRuntime::select2(ended, pump).await;
        }));
        stream::unfold(receiver, |mut receiver| async move {
            let (at, item) = receiver.recv().await?;
            SimRuntime::sleep(at.saturating_sub(elapsed())).await;
            Some((item, receiver))
        })
        .boxed()
    }
}

fn may_be_repeated(request: &CallRequest) -> bool {
    // A network repeats datagrams, not calls; but what Raft asks must stand it.
    matches!(
        request.call,
        Some(Call::Append(_) | Call::Vote(_) | Call::PreVote(_) | Call::ReadIndex(_))
    )
}

impl Transport for Link {
    fn call(
        &self,
        target: Target,
        request: CallRequest,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        let this = self.clone();
        Box::pin(async move {
            let to = target.peer_url;
            let (handler, life) = this.bring(&to).await?;
            trace(life);
            let repeat = this.network.0.lock().weather.repeat_percent;
            if may_be_repeated(&request) && draw(|random| random.chance(repeat)) {
                let (handler, request) = (handler.clone(), request.clone());
                let later = draw(|random| random.time_ms(0..500));
                drop(spawn_in(life, async move {
                    SimRuntime::sleep(later).await;
                    drop(handler.call(request).await);
                }));
            }
            let answer = spawn_in(life, async move { handler.call(request).await });
            this.bring_back(&to, async { answer.await.ok() }).await
        })
    }

    fn append(
        &self,
        target: Target,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxFuture<
        'static,
        Result<BoxStream<'static, Result<AppendResponse, TransportError>>, TransportError>,
    > {
        let this = self.clone();
        Box::pin(async move {
            let to = target.peer_url;
            let (handler, life) = this.bring(&to).await?;
            // Each end is gone when the reader of the answers is.
            let (guard, ended) = oneshot::channel();
            let (back_guard, back_ended) = oneshot::channel();
            let requests = this.carry(&this.own, &to, requests, ended);
            let (link, from) = (this.clone(), to.clone());
            let answers = spawn_in(life, async move {
                let responses = handler.append(requests).boxed();
                link.carry(&from, &link.own, responses, back_ended)
            });
            let responses = answers.await.map_err(|_| broken(&to))?;
            let responses = stream::unfold(Some((responses, guard, back_guard)), move |state| {
                let to = to.clone();
                async move {
                    let (mut responses, guard, back_guard) = state?;
                    match responses.next().await {
                        Some(response) => {
                            Some((Ok(response), Some((responses, guard, back_guard))))
                        }
                        None => Some((Err(broken(&to)), None)),
                    }
                }
            });
            Ok(responses.boxed())
        })
    }

    fn install_snapshot(
        &self,
        target: Target,
        parts: BoxStream<'static, SnapshotPart>,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        let this = self.clone();
        Box::pin(async move {
            let to = target.peer_url;
            let (handler, life) = this.bring(&to).await?;
            let (_guard, ended) = oneshot::channel();
            let parts = this.carry(&this.own, &to, parts, ended);
            let answer = spawn_in(life, async move { handler.install_snapshot(parts).await });
            this.bring_back(&to, async { answer.await.ok() }).await
        })
    }
}
