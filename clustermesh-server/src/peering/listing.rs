//! A peer's records of one kind at one revision: all of them, or put together from what changed and what our copy has.

use std::collections::BTreeMap;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_api::keys::RecordKey;
use clustermesh_client::{Client, ListPager, Listing};
use clustermesh_mesh::peering::Peer;
use clustermesh_mesh::{View, prefix_end};

use super::error::LinkError;
use crate::store::Store;
use crate::view::StateView;

/// Most keys of one kind of one peer.
const MAX_LISTED_KEYS: usize = 2_000_000;
/// Most bytes of keys and values of one kind of one peer.
const MAX_LISTED_BYTES: usize = 1 << 30;
/// Records that neither changed nor are in our copy (refused ones) are fetched one by one up to so many.
const MAX_SINGLE_FETCHES: usize = 64;

/// Keys and values of a prefix.
#[derive(Debug)]
pub(super) struct Records {
    /// All records, in key order.
    pub(super) records: Vec<(Bytes, Bytes)>,
    /// Of how many the value was read from the peer.
    pub(super) values_read: usize,
    /// The store that answered.
    pub(super) store_id: u64,
}

/// The range of a prefix at a revision; 0: now.
pub(super) fn range_of(prefix: &str, revision: i64) -> RangeRequest {
    RangeRequest {
        key: prefix.to_owned().into(),
        range_end: prefix_end(prefix.as_bytes()),
        revision,
        ..RangeRequest::default()
    }
}

/// All pages; a peer cannot make this server hold more than a bounded amount.
pub(super) async fn collect(mut pager: ListPager) -> Result<Listing, LinkError> {
    let mut listing = Listing::default();
    let mut bytes = 0;
    while let Some(page) = pager.next_page().await? {
        bytes += page
            .iter()
            .map(|kv| kv.key.len() + kv.value.len())
            .sum::<usize>();
        listing.kvs.extend(page);
        if listing.kvs.len() > MAX_LISTED_KEYS || bytes > MAX_LISTED_BYTES {
            return Err(LinkError::Protocol(format!(
                "a listing of more than {MAX_LISTED_KEYS} keys or {MAX_LISTED_BYTES} bytes is not taken"
            )));
        }
    }
    listing.revision = pager.revision();
    listing.store_id = pager.store_id();
    Ok(listing)
}

/// Everything under `prefix` at `revision`.
pub(super) async fn full(
    client: &Client,
    prefix: &str,
    revision: i64,
) -> Result<Records, LinkError> {
    let listing = collect(client.list(range_of(prefix, revision))).await?;
    let store_id = listing.store_id;
    let records = pairs(listing);
    Ok(Records {
        values_read: records.len(),
        records,
        store_id,
    })
}

/// The same when our copy equals the peer's revision `since` of the same store: keys only, and the values that changed.
pub(super) async fn since(
    client: &Client,
    store: &Store,
    peer: &Peer,
    prefix: &str,
    revision: i64,
    since: i64,
) -> Result<Records, LinkError> {
    let keys = RangeRequest {
        keys_only: true,
        ..range_of(prefix, revision)
    };
    let changed = RangeRequest {
        min_mod_revision: since + 1,
        ..range_of(prefix, revision)
    };
    let keys = collect(client.list(keys)).await?;
    let changed = collect(client.list(changed)).await?;
    let store_id = keys.store_id;
    let mut known: BTreeMap<Bytes, Bytes> = pairs(changed).into_iter().collect();
    let mut values_read = known.len();
    let mut missing = Vec::new();
    let mut records = Vec::with_capacity(keys.kvs.len());
    for key in keys.kvs.into_iter().map(|kv| kv.key) {
        match known.remove(&key).or_else(|| copied(store, peer, &key)) {
            Some(value) => records.push((key, value)),
            None => missing.push(key),
        }
    }
    if missing.len() > MAX_SINGLE_FETCHES {
        return full(client, prefix, revision).await;
    }
    for key in missing {
        let response = client
            .range(RangeRequest {
                key,
                revision,
                ..RangeRequest::default()
            })
            .await?;
        values_read += response.kvs.len();
        records.extend(response.kvs.into_iter().map(|kv| (kv.key, kv.value)));
    }
    Ok(Records {
        records,
        values_read,
        store_id,
    })
}

/// What our copy has of a record; it is byte for byte the peer's.
fn copied(store: &Store, peer: &Peer, key: &[u8]) -> Option<Bytes> {
    let copy = peer.cache_key(&RecordKey::parse(key).ok()?)?;
    let kv = store.read(|state| StateView(state).get(&copy.to_bytes()))?;
    Some(kv.value)
}

fn pairs(listing: Listing) -> Vec<(Bytes, Bytes)> {
    listing
        .kvs
        .into_iter()
        .map(|kv| (kv.key, kv.value))
        .collect()
}
