//! Strict reading and the rules of manifests.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, de::DeserializeOwned};

use super::{
    API_VERSION, AnnotationError, KIND_SERVICE, KIND_WORKLOAD, Manifest, Metadata, Object,
    ServiceAnnotations, ServiceSpec, WorkloadSpec,
};
use crate::{
    limits::{
        MAX_ANNOTATIONS_BYTES, MAX_LABELS_PER_OBJECT, MAX_MANIFEST_BYTES, MAX_PORTS_PER_SERVICE,
    },
    names::{NameError, check_dns_label, check_dns_subdomain},
    records::{
        error::IdentityError,
        identity::{CLUSTER_LABEL, Identity, NAMESPACE_LABEL, SERVICE_ACCOUNT_LABEL},
    },
};

/// Longest label value, as in Kubernetes.
const MAX_LABEL_VALUE_BYTES: usize = 63;

/// A manifest that is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Longer than [`MAX_MANIFEST_BYTES`].
    #[error("manifest of {0} bytes is longer than {MAX_MANIFEST_BYTES}")]
    TooLarge(usize),
    /// Not an object with `apiVersion`, `kind` and `metadata.name`.
    #[error("not a manifest: {0}")]
    NotAManifest(serde_json::Error),
    /// Another `apiVersion`.
    #[error("{object}: apiVersion {found:?} is not known, expected {API_VERSION:?}")]
    ApiVersion {
        /// Kind, namespace and name.
        object: String,
        /// What was written.
        found: String,
    },
    /// Another `kind`.
    #[error(
        "{object}: kind {found:?} is not known, expected {KIND_SERVICE:?} or {KIND_WORKLOAD:?}"
    )]
    Kind {
        /// Kind, namespace and name.
        object: String,
        /// What was written.
        found: String,
    },
    /// Fields of the wrong type, or missing ones.
    #[error("{object}: {field}: {reason}")]
    Shape {
        /// Kind, namespace and name.
        object: String,
        /// Path of the field, or of the object that lacks one.
        field: String,
        /// What was expected.
        reason: serde_json::Error,
    },
    /// Fields that the kind does not have.
    #[error("{object}: unknown field {field}")]
    UnknownField {
        /// Kind, namespace and name.
        object: String,
        /// Path of the field.
        field: String,
    },
    /// A broken rule.
    #[error("{object}: {field}: {fault}")]
    Invalid {
        /// Kind, namespace and name.
        object: String,
        /// Path of the field.
        field: String,
        /// The rule.
        fault: Fault,
    },
}

/// The rules that a field can break.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A reserved annotation.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The labels do not make an identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// More than is allowed.
    #[error("{count} given, at most {limit} are allowed")]
    TooMany {
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// Nothing where something is needed.
    #[error("must not be empty")]
    Empty,
    /// Port 0.
    #[error("must be 1 to 65535")]
    PortZero,
    /// Twice the same.
    #[error("{0} occurs twice")]
    Duplicate(String),
    /// A label key or value that Kubernetes would refuse.
    #[error(
        "label {0:?} must have a key of letters, digits, '-', '_', '.' with an optional DNS prefix and '/', and a value of at most 63 such characters"
    )]
    Label(String),
    /// A label key that the mesh sets itself.
    #[error("label {0:?} is set by the mesh, remove it")]
    ReservedLabel(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    metadata: HeadMetadata,
}

#[derive(Deserialize)]
struct HeadMetadata {
    #[serde(default)]
    name: String,
    #[serde(default = "super::default_namespace")]
    namespace: String,
}

pub(super) fn read(json: &[u8]) -> Result<Manifest, ManifestError> {
    let head: Head = serde_json::from_slice(json).map_err(ManifestError::NotAManifest)?;
    let object = format!(
        "{} {}/{}",
        head.kind, head.metadata.namespace, head.metadata.name
    );
    if head.api_version != API_VERSION {
        return Err(ManifestError::ApiVersion {
            object,
            found: head.api_version,
        });
    }
    match head.kind.as_str() {
        KIND_SERVICE => read_object::<ServiceSpec>(json, object).map(Manifest::Service),
        KIND_WORKLOAD => read_object::<WorkloadSpec>(json, object).map(Manifest::Workload),
        _ => Err(ManifestError::Kind {
            object,
            found: head.kind,
        }),
    }
}

fn read_object<Spec: DeserializeOwned + Default>(
    json: &[u8],
    object: String,
) -> Result<Object<Spec>, ManifestError> {
    let mut unknown = None;
    let mut place = serde_path_to_error::Track::new();
    let mut reader = serde_json::Deserializer::from_slice(json);
    let reader = serde_path_to_error::Deserializer::new(&mut reader, &mut place);
    let read = serde_ignored::deserialize(reader, |path| {
        unknown.get_or_insert_with(|| path.to_string());
    });
    match (read, unknown) {
        (Err(reason), _) => Err(ManifestError::Shape {
            object,
            field: place.path().to_string(),
            reason,
        }),
        (Ok(_), Some(field)) => Err(ManifestError::UnknownField { object, field }),
        (Ok(read), None) => Ok(read),
    }
}

pub(super) fn validate(manifest: &Manifest) -> Result<(), ManifestError> {
    let metadata = manifest.metadata();
    let checked = check_metadata(metadata).and_then(|()| match manifest {
        Manifest::Service(service) => check_service(service),
        Manifest::Workload(workload) => check_workload(workload),
    });
    checked.map_err(|(field, fault)| ManifestError::Invalid {
        object: format!(
            "{} {}/{}",
            manifest.kind(),
            metadata.namespace,
            metadata.name
        ),
        field,
        fault,
    })
}

type Checked = Result<(), (String, Fault)>;

fn at<E: Into<Fault>>(field: &str) -> impl FnOnce(E) -> (String, Fault) + '_ {
    move |error| (field.to_owned(), error.into())
}

fn at_most(field: &str, count: usize, limit: usize) -> Checked {
    if count <= limit {
        return Ok(());
    }
    Err((field.to_owned(), Fault::TooMany { count, limit }))
}

fn check_metadata(metadata: &Metadata) -> Checked {
    check_dns_subdomain(&metadata.name).map_err(at("metadata.name"))?;
    check_dns_label(&metadata.namespace).map_err(at("metadata.namespace"))?;
    check_labels("metadata.labels", &metadata.labels)?;
    let annotations = metadata.annotations.iter();
    let bytes = annotations
        .map(|(key, value)| key.len() + value.len())
        .sum();
    at_most("metadata.annotations (bytes)", bytes, MAX_ANNOTATIONS_BYTES)
}

fn check_labels(field: &str, labels: &BTreeMap<String, String>) -> Checked {
    at_most(field, labels.len(), MAX_LABELS_PER_OBJECT)?;
    let word = |text: &str| {
        let bytes = text.as_bytes();
        bytes.len() <= MAX_LABEL_VALUE_BYTES
            && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
    };
    for (key, value) in labels {
        let key_is_valid = match key.split_once('/') {
            Some((prefix, name)) => check_dns_subdomain(prefix).is_ok() && word(name),
            None => word(key),
        };
        if !key_is_valid || !(value.is_empty() || word(value)) {
            return Err((field.to_owned(), Fault::Label(format!("{key}={value}"))));
        }
    }
    Ok(())
}

fn check_service(service: &Object<ServiceSpec>) -> Checked {
    // A service's name is a host name in DNS.
    check_dns_label(&service.metadata.name).map_err(at("metadata.name"))?;
    ServiceAnnotations::check(&service.metadata.annotations).map_err(at("metadata.annotations"))?;
    let spec = &service.spec;
    if spec.selector.is_empty() {
        return Err(("spec.selector".to_owned(), Fault::Empty));
    }
    check_labels("spec.selector", &spec.selector)?;
    if spec.ports.is_empty() {
        return Err(("spec.ports".to_owned(), Fault::Empty));
    }
    at_most("spec.ports", spec.ports.len(), MAX_PORTS_PER_SERVICE)?;
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        if port.port == 0 {
            return Err((field("port"), Fault::PortZero));
        }
        if port.target_port == Some(0) {
            return Err((field("targetPort"), Fault::PortZero));
        }
        if !(port.name.is_empty() && spec.ports.len() == 1) {
            check_dns_label(&port.name).map_err(at(&field("name")))?;
        }
        if !names.insert(&port.name) {
            return Err((field("name"), Fault::Duplicate(port.name.clone())));
        }
        if !numbers.insert((port.port, port.protocol)) {
            let number = format!("{}/{}", port.port, port.protocol.name());
            return Err((field("port"), Fault::Duplicate(number)));
        }
    }
    let families: BTreeSet<_> = spec.ip_families.iter().collect();
    if families.len() < spec.ip_families.len() {
        return Err((
            "spec.ipFamilies".to_owned(),
            Fault::Duplicate("a family".to_owned()),
        ));
    }
    Ok(())
}

fn check_workload(workload: &Object<WorkloadSpec>) -> Checked {
    let metadata = &workload.metadata;
    if let Some(account) = &workload.spec.service_account {
        check_dns_subdomain(account).map_err(at("spec.serviceAccount"))?;
    }
    for key in [CLUSTER_LABEL, NAMESPACE_LABEL, SERVICE_ACCOUNT_LABEL] {
        if metadata.labels.contains_key(key) {
            return Err((
                "metadata.labels".to_owned(),
                Fault::ReservedLabel(key.to_owned()),
            ));
        }
    }
    // The cluster's name is the server's; any of the longest kind shows whether the labels fit.
    let cluster = "c".repeat(crate::limits::MAX_CLUSTER_NAME_BYTES);
    let account = workload.spec.service_account.as_deref();
    Identity::of_workload(&cluster, &metadata.namespace, account, &metadata.labels)
        .map(|_| ())
        .map_err(at("metadata.labels"))
}
