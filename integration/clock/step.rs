//! A library to preload into a process under test (`LD_PRELOAD`): its wall clock differs from the machine's by as many
//! seconds as stand in a file, also when that changes while it runs. Other clocks are left alone.
//!
//! `CLOCK_STEP_FILE` names the file: eight bytes, a signed number of seconds. Built by `rustc` alone, see `lab::clock`.

use std::ffi::{c_char, c_int, c_long, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

const CLOCK_REALTIME: c_int = 0;
const CLOCK_REALTIME_COARSE: c_int = 5;
const SYS_CLOCK_GETTIME: c_long = if cfg!(target_arch = "aarch64") { 113 } else { 228 };
const PROT_READ: c_int = 1;
const MAP_SHARED: c_int = 1;

#[repr(C)]
pub struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn getenv(name: *const c_char) -> *const c_char;
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn mmap(
        address: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        descriptor: c_int,
        offset: i64,
    ) -> *mut c_void;
}

/// The mapped file, once it is.
static STEP: AtomicPtr<AtomicI64> = AtomicPtr::new(ptr::null_mut());

fn step_seconds() -> i64 {
    let mut step = STEP.load(Ordering::Acquire);
    if step.is_null() {
        // SAFETY: the name is a C string; what getenv returns is one, or null.
        let path = unsafe { getenv(c"CLOCK_STEP_FILE".as_ptr()) };
        if path.is_null() {
            return 0;
        }
        // SAFETY: `path` is a C string.
        let file = unsafe { open(path, 0) };
        // SAFETY: a new mapping, of a descriptor that the kernel checks.
        let mapped = unsafe { mmap(ptr::null_mut(), 8, PROT_READ, MAP_SHARED, file, 0) };
        if mapped.addr() == usize::MAX {
            return 0;
        }
        step = mapped.cast();
        STEP.store(step, Ordering::Release);
    }
    // SAFETY: eight bytes at the start of a page are mapped, readable and aligned, for as long as the process lives.
    unsafe { (*step).load(Ordering::Relaxed) }
}

/// In place of the C library's.
///
/// # Safety
/// As clock_gettime(2): `time` points to a `timespec`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int {
    // SAFETY: the system call checks its arguments.
    let result = unsafe { syscall(SYS_CLOCK_GETTIME, c_long::from(clock), time) };
    if result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) {
        // SAFETY: the kernel has just written there.
        unsafe { (*time).seconds += step_seconds() };
    }
    result as c_int
}
