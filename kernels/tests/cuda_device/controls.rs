//! Questions to the stand-in that no driver answers.

/// Bytes of device memory that the stand-in has given and not got back.
pub fn allocated_bytes() -> i64 {
    ask(c"stand_in_allocated_bytes")
}

/// Bytes of pinned host memory that it has given and not got back.
pub fn pinned_bytes() -> i64 {
    ask(c"stand_in_pinned_bytes")
}

/// How often it was called since it was loaded.
pub fn n_calls() -> i64 {
    ask(c"stand_in_calls")
}

/// Priority of the stream that was last given a kernel, and the multiprocessors that its work runs on.
pub fn last_launch() -> (i64, i64) {
    (ask(c"stand_in_last_priority"), ask(c"stand_in_last_multiprocessors"))
}

fn ask(name: &std::ffi::CStr) -> i64 {
    // SAFETY: the stand-in's functions of these names take nothing and return an integer of 64 bits.
    let function: extern "C" fn() -> i64 = unsafe { std::mem::transmute(symbol(name)) };
    function()
}

/// How often the stand-in has been asked for something since the process began.
pub fn count(name: &std::ffi::CStr) -> i64 {
    // SAFETY: the stand-in's function of that name has this signature.
    let function: extern "C" fn(*const std::ffi::c_char) -> i64 =
        unsafe { std::mem::transmute(symbol(c"stand_in_count")) };
    let n = function(name.as_ptr());
    assert!(n >= 0, "{name:?}");
    n
}

/// Makes the stand-in answer otherwise from now on, in the whole process.
pub fn set(name: &std::ffi::CStr, value: i64) {
    // SAFETY: the stand-in's function of that name has this signature.
    let function: extern "C" fn(*const std::ffi::c_char, i64) -> i32 =
        unsafe { std::mem::transmute(symbol(c"stand_in_set")) };
    assert_eq!(function(name.as_ptr(), value), 1, "{name:?}");
}

/// A function of the stand-in, which has been loaded.
fn symbol(name: &std::ffi::CStr) -> *mut std::ffi::c_void {
    // SAFETY: a string that ends in zero.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}
