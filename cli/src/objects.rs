//! `apply` and `delete`.

use anyhow::{Result, ensure};
use clustermesh_api::{
    manifest::{DEFAULT_NAMESPACE, KIND_SERVICE, KIND_WORKLOAD, Manifest},
    names::{check_dns_label, check_dns_subdomain},
    v1::{ObjectOutcome, ObjectRef, object_outcome::Action},
};
use serde_json::{Value, json};

use crate::{
    args::{ApplyArgs, DeleteArgs, GlobalArgs, ObjectKind, Output},
    connect::connect,
    manifests,
    output::{self, printable},
};

pub async fn apply(global: &GlobalArgs, args: &ApplyArgs) -> Result<()> {
    let manifests = manifests::read(&args.file)?;
    let client = connect(global).await?;
    let json = manifests.iter().map(Manifest::to_json).collect();
    let response = client.apply(json, args.dry_run).await?;
    print(global, &response.objects, response.revision, args.dry_run)
}

pub async fn delete(global: &GlobalArgs, args: &DeleteArgs) -> Result<()> {
    let objects = references(args)?;
    let client = connect(global).await?;
    let response = client.delete(objects).await?;
    print(global, &response.objects, response.revision, false)
}

fn references(args: &DeleteArgs) -> Result<Vec<ObjectRef>> {
    if let Some(file) = &args.file {
        let reference = |manifest: &Manifest| ObjectRef {
            kind: manifest.kind().to_owned(),
            namespace: manifest.metadata().namespace.clone(),
            name: manifest.metadata().name.clone(),
        };
        return Ok(manifests::read(file)?.iter().map(reference).collect());
    }
    let object = args.object.as_deref().unwrap_or_default();
    let (namespace, name) = object
        .split_once('/')
        .unwrap_or((DEFAULT_NAMESPACE, object));
    ensure!(!name.is_empty(), "{object:?} is not NAMESPACE/NAME");
    check_dns_label(namespace)?;
    check_dns_subdomain(name)?;
    let kind = match args.kind {
        Some(ObjectKind::Workload) => KIND_WORKLOAD,
        _ => KIND_SERVICE,
    };
    Ok(vec![ObjectRef {
        kind: kind.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }])
}

fn print(
    global: &GlobalArgs,
    objects: &[ObjectOutcome],
    revision: i64,
    dry_run: bool,
) -> Result<()> {
    match global.output {
        Output::Json => {
            let objects: Vec<Value> = objects.iter().map(to_json).collect();
            output::json(&json!({ "revision": revision, "dryRun": dry_run, "objects": objects }))
        }
        Output::Table => {
            let lines: String = objects
                .iter()
                .map(|object| to_line(object, dry_run))
                .collect();
            output::print(&lines)
        }
    }
}

fn action(object: &ObjectOutcome) -> &'static str {
    match object.action() {
        Action::Unchanged => "unchanged",
        Action::Created => "created",
        Action::Configured => "configured",
        Action::Deleted => "deleted",
        Action::NotFound => "not found",
    }
}

fn to_json(object: &ObjectOutcome) -> Value {
    let mut json = json!({
        "kind": object.kind,
        "namespace": object.namespace,
        "name": object.name,
        "action": action(object),
    });
    if !object.addresses.is_empty() {
        json["addresses"] = json!(object.addresses);
    }
    if object.identity != 0 {
        json["identity"] = json!(object.identity);
    }
    json
}

fn to_line(object: &ObjectOutcome, dry_run: bool) -> String {
    let kind = object.kind.to_lowercase();
    let mut line = format!(
        "{kind} {}/{} {}",
        object.namespace,
        object.name,
        action(object)
    );
    if !object.addresses.is_empty() {
        line.push_str(&format!(", addresses {}", object.addresses.join(" ")));
    }
    if object.identity != 0 {
        line.push_str(&format!(", identity {}", object.identity));
    }
    if dry_run {
        line.push_str(" (dry run)");
    }
    let mut line = printable(&line);
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delete_args(object: &str) -> DeleteArgs {
        DeleteArgs {
            file: None,
            kind: Some(ObjectKind::Workload),
            object: Some(object.to_owned()),
        }
    }

    #[test]
    fn an_object_is_named_with_or_without_namespace() {
        let named = |object| references(&delete_args(object)).map(|mut list| list.remove(0));
        let reference = named("shop/cart").unwrap();
        assert_eq!(
            (reference.kind.as_str(), reference.namespace.as_str()),
            ("Workload", "shop")
        );
        assert_eq!(named("cart").unwrap().namespace, "default");
        for bad in ["", "shop/", "/cart", "a/b/c", "Shop/cart"] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn outcomes_are_printed_with_what_the_server_decided() {
        let object = ObjectOutcome {
            kind: "Service".to_owned(),
            namespace: "shop".to_owned(),
            name: "cart".to_owned(),
            action: Action::Created.into(),
            addresses: vec!["10.96.0.7".to_owned(), "fd00::7".to_owned()],
            identity: 0,
        };
        assert_eq!(
            to_line(&object, true),
            "service shop/cart created, addresses 10.96.0.7 fd00::7 (dry run)\n"
        );
        assert_eq!(
            to_json(&object)["addresses"],
            json!(["10.96.0.7", "fd00::7"])
        );
        assert!(to_json(&object).get("identity").is_none());
    }
}
