//! The label set of an identity: a bare string of sorted labels, each with a closing `;`, not JSON.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;

use super::error::{DecodeError, IdentityError};
use crate::limits::MAX_IDENTITY_LABELS_BYTES;

/// Source of labels that come from Kubernetes or a Workload.
pub const SOURCE_K8S: &str = "k8s";
/// Key of the label that names an identity's cluster.
pub const CLUSTER_LABEL: &str = "io.cilium.k8s.policy.cluster";
/// Key of the label that names an identity's service account.
pub const SERVICE_ACCOUNT_LABEL: &str = "io.cilium.k8s.policy.serviceaccount";
/// Key of the label that names an identity's namespace.
pub const NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";

/// One label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label {
    /// Where it comes from, for example `k8s`.
    pub source: String,
    /// Key, unique in a set.
    pub key: String,
    /// Value, may be empty.
    pub value: String,
}

impl Label {
    /// A label of source `k8s`.
    #[must_use]
    pub fn k8s(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            source: SOURCE_K8S.to_owned(),
            key: key.into(),
            value: value.into(),
        }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}={}", self.source, self.key, self.value)
    }
}

/// A set of labels, ordered by key: the meaning of an identity number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    labels: BTreeMap<String, (String, String)>,
}

impl Identity {
    /// Makes a set.
    ///
    /// # Errors
    /// No label, a key twice, a part that cannot be written, or too long in all.
    pub fn new(labels: impl IntoIterator<Item = Label>) -> Result<Self, IdentityError> {
        let mut set = BTreeMap::new();
        for label in labels {
            let unwritable = label.source.is_empty()
                || label.source.contains([':', ';', '='])
                || label.key.is_empty()
                || label.key.contains([';', '='])
                || label.value.contains(';');
            if unwritable {
                return Err(IdentityError::Label(label.to_string()));
            }
            if set
                .insert(label.key.clone(), (label.source, label.value))
                .is_some()
            {
                return Err(IdentityError::Duplicate(label.key));
            }
        }
        if set.is_empty() {
            return Err(IdentityError::Empty);
        }
        let identity = Self { labels: set };
        let bytes = identity.to_string().len();
        if bytes > MAX_IDENTITY_LABELS_BYTES {
            return Err(IdentityError::TooLong(bytes));
        }
        Ok(identity)
    }

    /// The label set of a workload: its own labels, and those that say cluster, namespace and service account.
    ///
    /// # Errors
    /// As [`Identity::new`]; a workload cannot set one of the reserved keys itself.
    pub fn of_workload(
        cluster: &str,
        namespace: &str,
        service_account: Option<&str>,
        labels: &BTreeMap<String, String>,
    ) -> Result<Self, IdentityError> {
        let reserved = [
            Label::k8s(CLUSTER_LABEL, cluster),
            Label::k8s(NAMESPACE_LABEL, namespace),
        ];
        let account = service_account.map(|name| Label::k8s(SERVICE_ACCOUNT_LABEL, name));
        let own = labels.iter().map(|(key, value)| Label::k8s(key, value));
        Self::new(reserved.into_iter().chain(account).chain(own))
    }

    /// Reads the label string.
    ///
    /// # Errors
    /// Not UTF-8, or not a set of labels.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        if value.len() > MAX_IDENTITY_LABELS_BYTES {
            return Err(IdentityError::TooLong(value.len()).into());
        }
        let text = std::str::from_utf8(value).map_err(|_| DecodeError::NotUtf8)?;
        let body = text.strip_suffix(';').ok_or_else(|| {
            if text.is_empty() {
                IdentityError::Empty
            } else {
                IdentityError::Label(text.to_owned())
            }
        })?;
        let labels: Result<Vec<Label>, IdentityError> = body.split(';').map(parse_label).collect();
        Ok(Self::new(labels?)?)
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        Bytes::from(self.to_string())
    }

    /// The labels, by key.
    pub fn labels(&self) -> impl Iterator<Item = Label> + '_ {
        self.labels.iter().map(|(key, (source, value))| Label {
            source: source.clone(),
            key: key.clone(),
            value: value.clone(),
        })
    }

    /// The value of a label of source `k8s`.
    #[must_use]
    pub fn k8s_label(&self, key: &str) -> Option<&str> {
        self.labels
            .get(key)
            .filter(|(source, _)| source == SOURCE_K8S)
            .map(|(_, value)| value.as_str())
    }

    /// The cluster that the labels name.
    #[must_use]
    pub fn cluster(&self) -> Option<&str> {
        self.k8s_label(CLUSTER_LABEL)
    }

    /// The namespace that the labels name.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.k8s_label(NAMESPACE_LABEL)
    }
}

fn parse_label(text: &str) -> Result<Label, IdentityError> {
    let fault = || IdentityError::Label(text.to_owned());
    let (source, rest) = text.split_once(':').ok_or_else(fault)?;
    let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
    Ok(Label {
        source: source.to_owned(),
        key: key.to_owned(),
        value: value.to_owned(),
    })
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (key, (source, value)) in &self.labels {
            write!(f, "{source}:{key}={value};")?;
        }
        Ok(())
    }
}
