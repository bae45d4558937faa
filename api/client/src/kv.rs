//! etcd's KV service.

use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::{
    etcd::{
        mvcc::KeyValue,
        rpc::{
            DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest,
            RangeResponse, TxnRequest, TxnResponse, kv_client::KvClient,
        },
    },
    keys::prefix_end,
    limits::{LIST_PAGE_KEYS, MAX_GRPC_CLIENT_RECV_BYTES},
};
use tonic::{Request, transport::Channel};

use crate::{Client, ClientError};

/// Time for one unary call, reading and connecting included.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// A range as it was at one revision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listing {
    /// In key order.
    pub kvs: Vec<KeyValue>,
    /// The revision of all of them.
    pub revision: i64,
    /// The store they are from.
    pub store_id: u64,
}

impl Client {
    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel()).max_decoding_message_size(MAX_GRPC_CLIENT_RECV_BYTES)
    }

    /// Any Range call.
    ///
    /// # Errors
    /// The call failed.
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse, ClientError> {
        let answer = self.kv().range(timed(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// One key, linearizable; `None` when it does not exist.
    ///
    /// # Errors
    /// The call failed.
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<KeyValue>, ClientError> {
        let request = RangeRequest {
            key: key.into(),
            ..RangeRequest::default()
        };
        Ok(self.range(request).await?.kvs.into_iter().next())
    }

    /// All keys with a prefix, page by page at the revision of the first page.
    #[must_use]
    pub fn list_prefix(&self, prefix: &str) -> ListPager {
        self.list(RangeRequest {
            key: Bytes::copy_from_slice(prefix.as_bytes()),
            range_end: prefix_end(prefix.as_bytes()).into(),
            ..RangeRequest::default()
        })
    }

    /// A range page by page, at the revision of the first page. The request's limit is the size of a page (0 =
    /// [`LIST_PAGE_KEYS`]); its order must be by key.
    #[must_use]
    pub fn list(&self, mut request: RangeRequest) -> ListPager {
        if request.limit <= 0 {
            request.limit = i64::try_from(LIST_PAGE_KEYS).unwrap_or(i64::MAX);
        }
        ListPager {
            client: self.clone(),
            next: Some(request),
            revision: 0,
            store_id: 0,
        }
    }

    /// Any Put call.
    ///
    /// # Errors
    /// The call failed; whether it took place is then unknown unless the code says otherwise.
    pub async fn put(&self, request: PutRequest) -> Result<PutResponse, ClientError> {
        let answer = self.kv().put(timed(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Any DeleteRange call.
    ///
    /// # Errors
    /// As [`Client::put`].
    pub async fn delete_range(
        &self,
        request: DeleteRangeRequest,
    ) -> Result<DeleteRangeResponse, ClientError> {
        let answer = self.kv().delete_range(timed(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Any Txn call.
    ///
    /// # Errors
    /// As [`Client::put`].
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, ClientError> {
        let answer = self.kv().txn(timed(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }
}

/// A listing in pages, all of one revision, whatever is written meanwhile.
#[derive(Debug)]
pub struct ListPager {
    client: Client,
    next: Option<RangeRequest>,
    revision: i64,
    store_id: u64,
}

impl ListPager {
    /// The next page; `None` after the last.
    ///
    /// # Errors
    /// The call failed; the revision was compacted between two pages ([`ClientError::is_compacted`]); another store
    /// answered.
    pub async fn next_page(&mut self) -> Result<Option<Vec<KeyValue>>, ClientError> {
        let Some(request) = self.next.clone() else {
            return Ok(None);
        };
        let response = self.client.range(request.clone()).await?;
        let endpoint = || self.client.endpoint();
        let header = response.header.ok_or_else(|| ClientError::Protocol {
            endpoint: endpoint(),
            reason: "a Range response without header".to_owned(),
        })?;
        if self.revision == 0 {
            // The header always carries the store's present revision, so only the first page's counts.
            self.revision = if request.revision > 0 {
                request.revision
            } else {
                header.revision
            };
            self.store_id = header.cluster_id;
        } else if header.cluster_id != self.store_id {
            return Err(ClientError::Protocol {
                endpoint: endpoint(),
                reason: "another store answered in the middle of a listing".to_owned(),
            });
        }
        self.next = match response.kvs.last() {
            Some(last) if response.more => {
                let mut key = last.key.to_vec();
                key.push(0);
                Some(RangeRequest {
                    key: key.into(),
                    revision: self.revision,
                    ..request
                })
            }
            _ => None,
        };
        Ok(Some(response.kvs))
    }

    /// The revision of all pages; 0 before the first.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The store of all pages; 0 before the first.
    #[must_use]
    pub fn store_id(&self) -> u64 {
        self.store_id
    }

    /// All pages at once.
    ///
    /// # Errors
    /// As [`ListPager::next_page`], or more than `max_keys` keys.
    pub async fn collect(mut self, max_keys: usize) -> Result<Listing, ClientError> {
        let mut kvs = Vec::new();
        while let Some(page) = self.next_page().await? {
            kvs.extend(page);
            if kvs.len() > max_keys {
                return Err(ClientError::TooMany {
                    endpoint: self.client.endpoint(),
                    limit: max_keys,
                });
            }
        }
        Ok(Listing {
            kvs,
            revision: self.revision,
            store_id: self.store_id,
        })
    }
}
