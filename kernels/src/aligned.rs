//! Zeroed, 64-byte aligned buffers for activations and scratch. Not growable in place: contents are lost on growth.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Pod;

const ALIGN: usize = 64;

/// Buffers from here on are aligned to huge pages and ask for them: a product reads far more pages than a TLB holds.
const HUGE_PAGE: usize = 2 << 20;
const HUGE_FROM: usize = 8 << 20;

/// An owned `[T]` on a cache line boundary; pages are touched when first used.
pub(crate) struct AlignedBuf<T: Pod> {
    ptr: NonNull<T>,
    len: usize,
}

// SAFETY: the buffer owns its memory as Vec<T> would, and T is plain data.
unsafe impl<T: Pod> Send for AlignedBuf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Pod> Sync for AlignedBuf<T> {}

impl<T: Pod> AlignedBuf<T> {
    /// `len` zeroed elements.
    pub(crate) fn zeroed(len: usize) -> AlignedBuf<T> {
        if len == 0 {
            return AlignedBuf {
                ptr: NonNull::dangling(),
                len: 0,
            };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero, as len is not and T is not zero-sized.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw.cast::<T>()) else {
            handle_alloc_error(layout)
        };
        #[cfg(target_os = "linux")]
        if layout.align() == HUGE_PAGE {
            // SAFETY: the range is this very allocation. Failing only means small pages, so the answer does not matter.
            unsafe { libc::madvise(raw.cast(), layout.size() / HUGE_PAGE * HUGE_PAGE, libc::MADV_HUGEPAGE) };
        }
        AlignedBuf { ptr, len }
    }

    /// Makes room for `len` elements, losing the contents when it has to grow; returns exactly `len` of them.
    pub(crate) fn at_least(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            *self = AlignedBuf::zeroed(len.next_power_of_two());
        }
        &mut self[..len]
    }

    fn layout(len: usize) -> Layout {
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= ALIGN) };
        let bytes = len.checked_mul(size_of::<T>()).expect("buffer size fits in usize");
        let align = if bytes >= HUGE_FROM { HUGE_PAGE } else { ALIGN };
        Layout::from_size_align(bytes, align).expect("buffer size fits in isize")
    }
}

impl<T: Pod> Drop for AlignedBuf<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.ptr.as_ptr().cast(), Self::layout(self.len)) }
        }
    }
}

impl<T: Pod> Default for AlignedBuf<T> {
    fn default() -> AlignedBuf<T> {
        AlignedBuf::zeroed(0)
    }
}

impl<T: Pod> Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised (zeroed or written) elements live at `ptr`, which is aligned even when len is 0.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_as_long_as_asked() {
        for len in [0, 1, 17, HUGE_FROM / 4 + 3] {
            let mut buffer = AlignedBuf::<u32>::zeroed(len);
            assert!(buffer.len() == len && buffer.iter().all(|word| *word == 0));
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(ALIGN));
            assert_eq!(buffer.at_least(5).len(), 5);
            buffer.fill(7);
            assert!(buffer.iter().all(|word| *word == 7) && buffer.len() >= 5);
        }
    }
}
