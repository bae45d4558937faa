use std::fs;

use super::*;

const CONFIG: &str = r#"{"cniVersion":"1.1.0","name":"mesh","type":"clustermesh-cni","socket":"SOCKET","queueDir":"QUEUE"}"#;

struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    async fn call(&self, command: &str) -> Result<Option<String>, CniError> {
        let config = CONFIG
            .replace(
                "SOCKET",
                &self.0.path().join("agent.sock").to_string_lossy(),
            )
            .replace("QUEUE", &self.0.path().join("queue").to_string_lossy());
        let get = |name: &str| {
            let value = match name {
                "CNI_COMMAND" => command,
                "CNI_CONTAINERID" => "abc",
                "CNI_NETNS" => "/run/netns/none",
                "CNI_IFNAME" => "eth0",
                "CNI_ARGS" => "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
                _ => return None,
            };
            Some(value.to_owned())
        };
        answer(get, config.as_bytes()).await
    }
}

#[tokio::test]
async fn without_an_agent_every_command_has_its_code() {
    let machine = Machine::new();
    for (command, expected) in [
        ("ADD", code::TRY_AGAIN_LATER),
        ("CHECK", code::TRY_AGAIN_LATER),
        ("GC", code::TRY_AGAIN_LATER),
        ("STATUS", code::NOT_AVAILABLE),
    ] {
        let error = machine.call(command).await.unwrap_err();
        assert_eq!(error.code, expected, "{command}");
        assert!(error.details.contains("agent.sock"), "{error}");
    }
}

#[tokio::test]
async fn del_without_an_agent_is_queued_durably() {
    let machine = Machine::new();
    assert_eq!(machine.call("DEL").await.unwrap(), None);
    assert_eq!(machine.call("DEL").await.unwrap(), None);
    let queued: Vec<_> = fs::read_dir(machine.0.path().join("queue"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(queued.len(), 1);
    let attachment: Attachment =
        serde_json::from_slice(&fs::read(queued[0].path()).unwrap()).unwrap();
    assert_eq!(attachment.container_id, "abc");
}

#[tokio::test]
async fn del_that_cannot_be_queued_is_an_error() {
    let machine = Machine::new();
    fs::write(machine.0.path().join("queue"), "a file").unwrap();
    let error = machine.call("DEL").await.unwrap_err();
    assert_eq!(error.code, code::IO_FAILURE);
}

#[tokio::test]
async fn version_needs_no_agent() {
    let text = Machine::new().call("VERSION").await.unwrap().unwrap();
    assert_eq!(
        text,
        r#"{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}"#
    );
}

#[tokio::test]
async fn an_unknown_command_and_a_bad_configuration_are_errors_of_the_specification() {
    let error = Machine::new().call("FROB").await.unwrap_err();
    assert_eq!(error.code, code::INVALID_ENVIRONMENT);
    let get = |name: &str| (name == "CNI_COMMAND").then(|| "STATUS".to_owned());
    let error = answer(get, b"not json").await.unwrap_err();
    assert_eq!(error.code, code::DECODING_FAILURE);
}

#[test]
fn a_result_names_host_end_container_end_addresses_and_routes() {
    let call = Call {
        command: Command::Add,
        container_id: "abc".to_owned(),
        netns: "/run/netns/x".to_owned(),
        ifname: "eth0".to_owned(),
        namespace: "shop".to_owned(),
        name: "web-0".to_owned(),
    };
    let response = CniAddResponse {
        addresses: vec![clustermesh_api::v1::CniAddress {
            address: "10.1.0.4/32".to_owned(),
            gateway: "10.1.0.1".to_owned(),
        }],
        host_interface: "cm001122334455".to_owned(),
        host_mac: "02:00:00:00:00:01".to_owned(),
        container_mac: "02:00:00:00:00:02".to_owned(),
        mtu: 1450,
        routes: vec![clustermesh_api::v1::CniRoute {
            destination: "0.0.0.0/0".to_owned(),
            gateway: "10.1.0.1".to_owned(),
        }],
    };
    let result = add_result(&call, response).unwrap();
    assert_eq!(result.interfaces[1].sandbox, "/run/netns/x");
    assert_eq!(result.ips[0].interface, Some(1));
    assert_eq!(result.routes[0].dst.to_string(), "0.0.0.0/0");
}
