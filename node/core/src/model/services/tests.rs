use clustermesh_ebpf_abi::IdentitySplit;

use super::*;
use crate::change::Change;
use crate::change::ServicePort;
use crate::refused::Reason;
use crate::{IPCACHE_WANTED_MAX, Settings};

fn service(name: &str, vip: [u8; 4], ports: usize) -> Change {
    let port = |number| ServicePort {
        name: format!("p{number}").into(),
        protocol: 6,
        port: number,
        target_port: number,
    };
    Change::Service {
        service: ServiceName {
            namespace: "shop".into(),
            name: name.into(),
        },
        declaration: (ports > 0).then(|| {
            Box::new(ServiceDeclaration {
                addresses: vec![vip.into()],
                ports: (1..=u16::MAX).take(ports).map(port).collect(),
                ..ServiceDeclaration::default()
            })
        }),
    }
}

#[test]
fn a_service_without_room_is_refused_and_placed_when_another_gives_some_up() {
    let settings = Settings {
        cluster: "east".into(),
        cluster_id: 1,
        node: "e1".into(),
        underlay: vec![[192, 0, 2, 1].into()],
        split: IdentitySplit::CLUSTERS_255,
        direct_routing: false,
        path_v4: None,
        path_v6: None,
        ipcache_wanted_max: IPCACHE_WANTED_MAX,
        encryption: crate::EncryptionSettings::default(),
    };
    let mut model = Model::new(settings, crate::tables::Tables::default());
    model.end_listing();
    model.apply(service("large", [172, 20, 0, 1], FRONTENDS_WANTED_MAX));
    let settled = model.plan();
    for step in settled.steps() {
        model.commit(&step);
    }
    model.apply(service("late", [172, 20, 0, 2], 2));
    assert!(model.plan().is_empty());
    assert_eq!(
        model.refused().counts().collect::<Vec<_>>(),
        [(Reason::MapFull, 2)]
    );

    model.apply(service("large", [172, 20, 0, 1], 0));
    let plan = model.plan();
    assert_eq!(plan.frontend_upserts.len(), 2, "the late one has its room");
    assert_eq!(plan.frontend_deletes.len(), FRONTENDS_WANTED_MAX);
}
