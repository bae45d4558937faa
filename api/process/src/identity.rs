//! Who a certificate speaks for: subject O, OU and CN as one typed value.

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::AttributeTypeAndValue;

/// The role that subject O names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Organisation {
    /// `clustermesh:node`: an agent of this cluster.
    Node,
    /// `clustermesh:peer`: another cluster's server.
    Peer,
    /// `clustermesh:operator`: a person or tool that may do everything.
    Operator,
    /// `clustermesh:server`: a server of this cluster.
    Server,
}

impl Organisation {
    /// As written in a certificate.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "clustermesh:node",
            Self::Peer => "clustermesh:peer",
            Self::Operator => "clustermesh:operator",
            Self::Server => "clustermesh:server",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Node, Self::Peer, Self::Operator, Self::Server]
            .into_iter()
            .find(|organisation| organisation.as_str() == text)
    }
}

/// The subject of a verified certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// Subject O.
    pub organisation: Organisation,
    /// Subject OU: the cluster that the holder belongs to.
    pub cluster: String,
    /// Subject CN: node name, `remote`, `remote-<peer>` or `admin-<cluster>`.
    pub common_name: String,
}

/// Why a certificate names nobody.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdentityError {
    /// Not an X.509 certificate.
    #[error("the certificate cannot be parsed: {0}")]
    Parse(String),
    /// A subject attribute is absent, given twice or not text.
    #[error("the certificate's subject needs exactly one {0}")]
    Attribute(&'static str),
    /// Subject O is none that this project gives.
    #[error(
        "the certificate's organisation {0:?} is not known; it must be clustermesh:node, clustermesh:peer, clustermesh:operator or clustermesh:server"
    )]
    Organisation(String),
}

impl PeerIdentity {
    /// Reads the subject. The chain must have been verified before.
    ///
    /// # Errors
    /// When the certificate does not parse or its subject is not one of ours.
    pub fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|error| IdentityError::Parse(error.to_string()))?;
        let subject = certificate.subject();
        let organisation = only("organisation (O)", subject.iter_organization())?;
        Ok(Self {
            organisation: Organisation::parse(organisation)
                .ok_or_else(|| IdentityError::Organisation(organisation.to_owned()))?,
            cluster: only(
                "organisational unit (OU)",
                subject.iter_organizational_unit(),
            )?
            .to_owned(),
            common_name: only("common name (CN)", subject.iter_common_name())?.to_owned(),
        })
    }
}

/// Two values of one attribute would let a holder choose: refused.
fn only<'a>(
    what: &'static str,
    mut values: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>,
) -> Result<&'a str, IdentityError> {
    match (values.next(), values.next()) {
        (Some(value), None) => value.as_str().map_err(|_| IdentityError::Attribute(what)),
        _ => Err(IdentityError::Attribute(what)),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(attributes: &[(DnType, &str)]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in attributes {
            params.distinguished_name.push(kind.clone(), *value);
        }
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn the_subject_becomes_a_typed_identity() {
        let der = certificate(&[
            (DnType::OrganizationName, "clustermesh:node"),
            (DnType::OrganizationalUnitName, "c1"),
            (DnType::CommonName, "w1"),
        ]);
        assert_eq!(
            PeerIdentity::from_certificate(&der).unwrap(),
            PeerIdentity {
                organisation: Organisation::Node,
                cluster: "c1".into(),
                common_name: "w1".into()
            }
        );
    }

    #[test]
    fn an_unknown_organisation_and_a_missing_unit_are_refused() {
        let der = certificate(&[
            (DnType::OrganizationName, "system:masters"),
            (DnType::OrganizationalUnitName, "c1"),
            (DnType::CommonName, "w1"),
        ]);
        assert_eq!(
            PeerIdentity::from_certificate(&der),
            Err(IdentityError::Organisation("system:masters".into()))
        );
        let der = certificate(&[
            (DnType::OrganizationName, "clustermesh:node"),
            (DnType::CommonName, "w1"),
        ]);
        assert!(matches!(
            PeerIdentity::from_certificate(&der),
            Err(IdentityError::Attribute(_))
        ));
        assert!(matches!(
            PeerIdentity::from_certificate(&CertificateDer::from(vec![1, 2, 3])),
            Err(IdentityError::Parse(_))
        ));
    }
}
