// Command oldstat reads directories as a 32-bit program does that was built without large-file support: with the
// system calls whose inode numbers have 32 bits. It prints how many entries it has seen below each argument, and
// ends at the first error.
package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"unsafe"
)

func main() {
	for _, top := range os.Args[1:] {
		seen, err := walk(top)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(top, seen)
	}
}

// walk counts what is below a directory.
func walk(dir string) (seen int, err error) {
	names, err := list(dir)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		isDir, err := lstat(path)
		if err != nil {
			return 0, err
		}
		seen++
		if isDir {
			below, err := walk(path)
			if err != nil {
				return 0, err
			}
			seen += below
		}
	}
	return seen, nil
}

// lstat tells whether path is a directory. struct stat of i386: dev, ino (4 bytes each), mode (2 bytes), ...
func lstat(path string) (isDir bool, err error) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return false, err
	}
	var st [64]byte
	_, _, errno := syscall.Syscall(syscall.SYS_LSTAT, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&st[0])), 0)
	if errno != 0 {
		return false, fmt.Errorf("lstat %s: %w", path, errno)
	}
	return binary.LittleEndian.Uint16(st[8:])&syscall.S_IFMT == syscall.S_IFDIR, nil
}

// list reads a directory. struct linux_dirent of i386: ino, offset (4 bytes each), length (2 bytes), name.
func list(dir string) (names []string, err error) {
	fd, err := syscall.Open(dir, syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	defer syscall.Close(fd)
	buf := make([]byte, 64<<10)
	for {
		n, _, errno := syscall.Syscall(syscall.SYS_GETDENTS, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		if errno != 0 {
			return nil, fmt.Errorf("getdents %s: %w", dir, errno)
		}
		if n == 0 {
			return names, nil
		}
		for b := buf[:n]; len(b) > 0; b = b[binary.LittleEndian.Uint16(b[8:]):] {
			name := b[10:binary.LittleEndian.Uint16(b[8:])]
			for i, c := range name {
				if c == 0 {
					name = name[:i]
					break
				}
			}
			if s := string(name); s != "." && s != ".." {
				names = append(names, s)
			}
		}
	}
}
