//! Tries what no call tells: whether the kernel takes a helper in a program, or a flag of a helper.
#![expect(unsafe_code, reason = "wraps bpf(2)")]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use super::bpf::{Command, call, new_fd};

/// `BPF_PROG_TYPE_SCHED_CLS`.
const CLASSIFIER: u32 = 3;
/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
const SOCKET_ADDRESS: u32 = 18;
/// `BPF_CGROUP_INET4_CONNECT`.
const CONNECT4: u32 = 10;

/// Helpers, by number.
const SKB_ADJUST_ROOM: i32 = 50;
const SET_RETVAL: i32 = 187;

/// `BPF_ADJ_ROOM_MAC`.
const AT_LINK_LAYER: i32 = 1;
/// Bytes of IPv4, UDP, VXLAN and Ethernet.
const TUNNEL_BYTES: i32 = 50;
/// `BPF_F_ADJ_ROOM_FIXED_GSO | …_ENCAP_L3_IPV4 | …_ENCAP_L4_UDP | …_ENCAP_L2_ETH`.
const WITH_ETHERNET: i32 = 1 | (1 << 1) | (1 << 4) | (1 << 6);
/// Upper half of the flags: 14 bytes of link layer inside.
const ETHERNET_BYTES: i32 = 14 << 24;

/// Attempts while the verifier answers EAGAIN.
const ATTEMPTS_MAX: u32 = 5;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

const fn instruction(code: u8, register: u8, value: i32) -> Instruction {
    Instruction {
        code,
        registers: register,
        offset: 0,
        value,
    }
}

/// `register = value`.
const fn set(register: u8, value: i32) -> Instruction {
    instruction(0xb7, register, value)
}

/// `register = value`, of 64 bits.
const fn set_wide(register: u8, low: i32, high: i32) -> [Instruction; 2] {
    [instruction(0x18, register, low), instruction(0, 0, high)]
}

const fn call_helper(number: i32) -> Instruction {
    instruction(0x85, 0, number)
}

const EXIT: Instruction = instruction(0x95, 0, 0);

#[repr(C)]
struct LoadAttr {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct RunAttr {
    program_fd: u32,
    returned: u32,
    data_in_bytes: u32,
    data_out_bytes: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration_ns: u32,
}

/// Whether a program at a socket call may choose the error with which the call ends.
pub(crate) fn socket_errors() -> bool {
    let program = [
        set(1, -libc::ECONNREFUSED),
        call_helper(SET_RETVAL),
        set(0, 0),
        EXIT,
    ];
    load(SOCKET_ADDRESS, CONNECT4, &program).is_ok()
}

/// Whether room for a tunnel can be made with an Ethernet header inside.
pub(crate) fn ethernet_inside() -> bool {
    let [low, high] = set_wide(4, WITH_ETHERNET, ETHERNET_BYTES);
    // The context is in the first register, the helper's answer is the program's.
    let program = [
        set(2, TUNNEL_BYTES),
        set(3, AT_LINK_LAYER),
        low,
        high,
        call_helper(SKB_ADJUST_ROOM),
        EXIT,
    ];
    load(CLASSIFIER, 0, &program)
        .and_then(|program| run(&program))
        .is_ok_and(|returned| returned == 0)
}

fn load(
    program_type: u32,
    expected_attach_type: u32,
    instructions: &[Instruction],
) -> io::Result<OwnedFd> {
    let mut attr = LoadAttr {
        program_type,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_bytes: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"cm_probe\0\0\0\0\0\0\0\0",
        ifindex: 0,
        expected_attach_type,
    };
    let mut attempt = 1;
    loop {
        // SAFETY: instructions and licence outlive the call, which only reads them.
        match unsafe { call(Command::ProgramLoad, &mut attr) } {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempt < ATTEMPTS_MAX => {
                attempt += 1;
            }
            result => return result.map(new_fd),
        }
    }
}

/// What a classifier returns for a packet: an IPv4 header and zeros.
fn run(program: &OwnedFd) -> io::Result<u32> {
    let mut packet = [0_u8; 64];
    packet[12] = 0x08;
    packet[14] = 0x45;
    let mut attr = RunAttr {
        program_fd: program.as_fd().as_raw_fd().cast_unsigned(),
        returned: 0,
        data_in_bytes: 64,
        data_out_bytes: 0,
        data_in: packet.as_ptr() as u64,
        data_out: 0,
        repeat: 1,
        duration_ns: 0,
    };
    // SAFETY: the packet is as long as is said and outlives the call; no room for an answer is named.
    unsafe { call(Command::ProgramRun, &mut attr) }?;
    Ok(attr.returned)
}
