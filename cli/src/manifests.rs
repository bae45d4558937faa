//! Reading manifests from YAML or JSON.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clustermesh_api::{
    limits::{MAX_MANIFEST_BYTES, MAX_MANIFESTS_PER_APPLY},
    manifest::Manifest,
};
use serde_json::Value;

/// Largest file: the largest manifests, some of them.
const MAX_FILE_BYTES: u64 = 16 * MAX_MANIFEST_BYTES as u64;

/// Reads a file, or standard input for `-`.
///
/// # Errors
/// When it cannot be read, is too large, or holds what is no manifest; the file is named.
pub fn read(path: &Path) -> Result<Vec<Manifest>> {
    let stdin = path == Path::new("-");
    let name = if stdin {
        "standard input".to_owned()
    } else {
        path.display().to_string()
    };
    let source: Box<dyn Read> = if stdin {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(path).with_context(|| format!("cannot open {name}"))?)
    };
    let mut text = String::new();
    source
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {name}"))?;
    ensure!(
        text.len() as u64 <= MAX_FILE_BYTES,
        "{name} is larger than {MAX_FILE_BYTES} bytes"
    );
    parse(&text).with_context(|| name)
}

/// Reads and checks every document; JSON is YAML too.
///
/// # Errors
/// When a document is not YAML or no manifest, or there are too many.
pub fn parse(text: &str) -> Result<Vec<Manifest>> {
    // The parser adds a picture of the place; line and column are enough for one line.
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| {
        let said = error.to_string();
        let first = said.lines().next().unwrap_or_default();
        anyhow!("not YAML: {}", first.trim_start_matches("error: "))
    })?;
    let documents: Vec<Value> = documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect();
    if documents.is_empty() {
        bail!("there is no manifest in it");
    }
    ensure!(
        documents.len() <= MAX_MANIFESTS_PER_APPLY,
        "{} manifests, at most {MAX_MANIFESTS_PER_APPLY} go at once",
        documents.len()
    );
    let read = |(index, document): (usize, &Value)| {
        let json = serde_json::to_vec(document)?;
        Manifest::from_json(&json)
            .map_err(|error| anyhow!("document {}: {}", index + 1, for_people(&error.to_string())))
    };
    documents.iter().enumerate().map(read).collect()
}

/// Without the place, which is one in JSON that was made of the document, and without names of types.
fn for_people(error: &str) -> String {
    let error = match error.rsplit_once(" at line ") {
        Some((said, place)) if place.contains(" column ") => said,
        _ => error,
    };
    error.replace("expected u16", "expected 0 to 65535")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_out_of_range_is_named_without_the_place_in_what_is_read_inside() {
        let error = format!(
            "{:#}",
            parse(&TWO.replace("port: 80,", "port: 80000,")).unwrap_err()
        );
        assert!(
            error.contains("spec.ports[0].port") && error.ends_with("expected 0 to 65535"),
            "{error}"
        );
    }

    const TWO: &str = "\
# a comment
apiVersion: clustermesh.io/v1
kind: Service
metadata:
  name: cart
  namespace: shop
  annotations:
    service.cilium.io/global: \"true\"
spec:
  selector: {app: cart}
  ports:
  - {name: http, port: 80, targetPort: 8080}
---
apiVersion: clustermesh.io/v1
kind: Workload
metadata: {name: cart-0, namespace: shop, labels: {app: cart}}
spec: {}
---
";

    #[test]
    fn documents_of_one_file_are_read_in_order() {
        let manifests = parse(TWO).unwrap();
        let kinds: Vec<&str> = manifests.iter().map(Manifest::kind).collect();
        assert_eq!(kinds, ["Service", "Workload"]);
        assert_eq!(manifests[0].metadata().name, "cart");
    }

    #[test]
    fn json_is_read_too() {
        let json = parse(TWO).unwrap()[0].to_json();
        assert_eq!(
            parse(std::str::from_utf8(&json).unwrap()).unwrap()[0],
            parse(TWO).unwrap()[0]
        );
    }

    #[test]
    fn errors_say_which_document_and_field() {
        let error = format!(
            "{:#}",
            parse(&TWO.replace("spec: {}", "spec: {acount: a}")).unwrap_err()
        );
        assert_eq!(
            error,
            "document 2: Workload shop/cart-0: unknown field spec.acount"
        );
        let error = format!("{:#}", parse(&TWO.replace("\"true\"", "true")).unwrap_err());
        assert!(
            error.starts_with(
                "document 1: Service shop/cart: metadata.annotations.service.cilium.io/global: invalid type: boolean"
            ) && error.matches("invalid type").count() == 1,
            "{error}"
        );
        let error = format!("{:#}", parse("a: [").unwrap_err());
        assert!(
            error.starts_with("not YAML: line 1 column") && !error.contains('\n'),
            "{error}"
        );
        assert!(
            parse("---\n---\n")
                .unwrap_err()
                .to_string()
                .contains("no manifest")
        );
    }

    #[test]
    fn a_yaml_bomb_is_refused() {
        let mut text = "a: &a [x,x,x,x,x,x,x,x,x]\n".to_owned();
        for (name, previous) in ('b'..='k').zip('a'..) {
            let items = vec![format!("*{previous}"); 9].join(",");
            text.push_str(&format!("{name}: &{name} [{items}]\n"));
        }
        assert!(parse(&text).is_err());
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = format!(
            "{:#}",
            read(Path::new("/nonexistent/shop.yaml")).unwrap_err()
        );
        assert!(
            error.starts_with("cannot open /nonexistent/shop.yaml: "),
            "{error}"
        );
    }
}
