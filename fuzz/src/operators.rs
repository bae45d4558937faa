//! What operators and container runtimes write: manifests, the server's configuration, a CNI network configuration.

use std::path::Path;

use clustermesh_api::manifest::Manifest;
use clustermesh_mesh::MapView;
use clustermesh_mesh::manifests::plan_apply;
use clustermesh_node_core::cni;
use clustermesh_server::config::Config;

use crate::agents::commit;
use crate::{manifests, peers};

pub(crate) fn files(bytes: &[u8]) -> bool {
    let Some((kind, text)) = bytes.split_first() else {
        return false;
    };
    match kind % 3 {
        0 => std::str::from_utf8(text).is_ok_and(apply),
        1 => std::str::from_utf8(text)
            .is_ok_and(|text| Config::parse(text, Path::new("/etc/server.toml")).is_ok()),
        _ => cni::Config::from_json(text).is_ok(),
    }
}

fn apply(text: &str) -> bool {
    let Ok(manifests) = manifests::parse(text) else {
        return false;
    };
    let jsons: Vec<_> = manifests.iter().map(Manifest::to_json).collect();
    for (manifest, json) in manifests.iter().zip(&jsons) {
        let again = Manifest::from_json(json);
        assert!(
            again.as_ref().is_ok_and(|again| again == manifest),
            "{manifest:?} became {again:?}"
        );
    }
    let mut view = MapView::new();
    let settings = peers::settings();
    let plan = plan_apply(&view, &settings, &jsons, 1);
    if commit(&mut view, plan).is_some() {
        // Said twice, nothing changes.
        let again = plan_apply(&view, &settings, &jsons, 2);
        let writes = again.map(|plan| plan.txn.writes().len());
        assert!(matches!(writes, Ok(0)), "{writes:?}: {text}");
    }
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let seed = |kind: u8, text: &str| [&[kind], text.as_bytes()].concat();
    vec![
        seed(
            0,
            "apiVersion: clustermesh.io/v1\nkind: Service\nmetadata:\n  name: cart\n  namespace: shop\n  annotations:\n    service.cilium.io/global: \"true\"\nspec:\n  selector: {app: cart}\n  ports:\n  - {name: http, port: 80, targetPort: 8080}\n---\napiVersion: clustermesh.io/v1\nkind: Workload\nmetadata: {name: cart-0, namespace: shop, labels: {app: cart}}\nspec: {}\n",
        ),
        seed(0, "- &a {b: 1}\n- *a\n---\n# not a manifest\nx: !!str y\n"),
        seed(
            1,
            "data_dir = \"/d\"\nlisten_client = \"0.0.0.0:2379\"\nquota_bytes = 1\n[cluster]\nname = \"c1\"\nid = 1\npod_cidr_v4 = \"10.1.0.0/16\"\nservice_cidr_v4 = \"10.96.1.0/24\"\n[tls]\nca = \"ca.crt\"\ncert = \"s.crt\"\nkey = \"s.key\"\n[compaction]\nmode = \"periodic\"\nretention = \"30m\"\n[replica]\nname = \"r1\"\nlisten_peer = \"0.0.0.0:2380\"\nclient_urls = [\"https://s1:2379\"]\ninitial_cluster = [\"r1=https://s1:2380\"]\n[[peers]]\nname = \"c2\"\nendpoints = [\"s:2379\"]\nca = \"a\"\ncert = \"b\"\nkey = \"c\"\n",
        ),
        seed(
            2,
            r#"{"cniVersion":"1.1.0","name":"mesh","type":"clustermesh-cni","socket":"/run/x","cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]}"#,
        ),
    ]
}
