package verity

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// digestOf computes the digest as linux/Documentation/filesystems/fsverity.rst describes it.
func digestOf(data []byte) (d Digest) {
	var root [hashSize]byte
	if level := data; len(data) > 0 {
		for {
			var next []byte
			for at := 0; at < len(level); at += blockSize {
				var block [blockSize]byte
				copy(block[:], level[at:])
				sum := sha256.Sum256(block[:])
				next = append(next, sum[:]...)
			}
			if len(next) == hashSize {
				root = [hashSize]byte(next)
				break
			}
			level = next
		}
	}
	descriptor := make([]byte, 256)
	descriptor[0], descriptor[1], descriptor[2] = 1, SHA256, 12
	binary.LittleEndian.PutUint64(descriptor[8:], uint64(len(data)))
	copy(descriptor[16:], root[:])
	d.Sum = sha256.Sum256(descriptor)
	return d
}

// needVerity skips where the file system of dir has no fs-verity, and returns dir.
func needVerity(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := Probe(dir); err != nil {
		t.Skipf("no fs-verity here (ext4 has it with the feature verity): %v", err)
	}
	return dir
}

// The digest of an empty file is known to every implementation.
func TestReference(t *testing.T) {
	d := digestOf(nil)
	if got := hex.EncodeToString(d.Sum[:]); got != "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95" {
		t.Error(got)
	}
}

// The kernel's digest is the reference's, the file takes what Space says, and nobody writes to it any more.
func TestEnable(t *testing.T) {
	dir := needVerity(t)
	r := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{0, 1, 641, 4096, 4097, 128 * 4096, 128*4096 + 1, 3 << 20} {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, data, 0o400); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Measure(fd); !errors.Is(err, ErrNone) {
			t.Errorf("%d bytes: before: %v", size, err)
		}
		for _, want := range []bool{true, false} {
			if enabled, err := Enable(fd); enabled != want || err != nil {
				t.Errorf("%d bytes: enabled %v, want %v: %v", size, enabled, want, err)
			}
		}
		if got, err := Measure(fd); got != digestOf(data) || err != nil {
			t.Errorf("%d bytes: digest %s, %v", size, got, err)
		}
		var st unix.Stat_t
		var fs unix.Statfs_t
		if err := errors.Join(unix.Fstat(fd, &st), unix.Fstatfs(fd, &fs)); err != nil {
			t.Fatal(err)
		}
		if want := int64(size+blockSize-1)/blockSize*blockSize + Space(int64(size)); fs.Type == unix.EXT4_SUPER_MAGIC &&
			st.Blocks*512 != want {
			t.Errorf("%d bytes occupy %d, want %d", size, st.Blocks*512, want)
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
		if _, err := os.OpenFile(path, os.O_WRONLY, 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("%d bytes: open for writing: %v", size, err)
		}
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// A file that somebody has open for writing is waited for.
func TestEnableWaitsForWriter(t *testing.T) {
	dir := needVerity(t)
	path := filepath.Join(dir, "file")
	w, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- EnablePath(path) }()
	time.Sleep(20 * time.Millisecond) // so that it comes too early
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
