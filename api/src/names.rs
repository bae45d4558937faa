//! The rules of names: clusters, RFC 1123 labels and subdomains.

use crate::limits::{MAX_CLUSTER_NAME_BYTES, MAX_DNS_LABEL_BYTES, MAX_DNS_SUBDOMAIN_BYTES};

/// A name that breaks its rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// See [`check_cluster_name`].
    #[error(
        "cluster name {0:?} must be 1 to {MAX_CLUSTER_NAME_BYTES} lower-case letters, digits or '-', with a letter or digit at both ends"
    )]
    Cluster(String),
    /// The name that Cilium gives to a cluster without one.
    #[error("cluster name \"default\" is reserved for a cluster without an id; choose another")]
    ReservedCluster,
    /// RFC 1123 label.
    #[error(
        "name {0:?} must be 1 to {MAX_DNS_LABEL_BYTES} lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123 label)"
    )]
    DnsLabel(String),
    /// RFC 1123 subdomain.
    #[error(
        "name {0:?} must be RFC 1123 labels joined by '.', in all at most {MAX_DNS_SUBDOMAIN_BYTES} characters"
    )]
    DnsSubdomain(String),
}

fn is_dns_label(name: &str, max_bytes: usize) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= max_bytes
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-')
}

/// A cluster's name: at most 32 characters, lower-case alphanumeric and `-`, alphanumeric at both ends.
///
/// # Errors
/// The name breaks the rule.
pub fn check_cluster_name(name: &str) -> Result<(), NameError> {
    if is_dns_label(name, MAX_CLUSTER_NAME_BYTES) {
        Ok(())
    } else {
        Err(NameError::Cluster(name.to_owned()))
    }
}

/// An RFC 1123 label (namespaces, services).
///
/// # Errors
/// The name breaks the rule.
pub fn check_dns_label(name: &str) -> Result<(), NameError> {
    if is_dns_label(name, MAX_DNS_LABEL_BYTES) {
        Ok(())
    } else {
        Err(NameError::DnsLabel(name.to_owned()))
    }
}

/// An RFC 1123 subdomain (nodes, workloads).
///
/// # Errors
/// The name breaks the rule.
pub fn check_dns_subdomain(name: &str) -> Result<(), NameError> {
    let labels = name
        .split('.')
        .all(|label| is_dns_label(label, MAX_DNS_LABEL_BYTES));
    if labels && name.len() <= MAX_DNS_SUBDOMAIN_BYTES {
        Ok(())
    } else {
        Err(NameError::DnsSubdomain(name.to_owned()))
    }
}
