package object

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// enable gives a file fs-verity.
func (sh *shard) enable(file string) error {
	fd, err := unix.Openat(sh.fd, file, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_, err = verity.Enable(fd)
	return errors.Join(err, unix.Close(fd))
}

// Digest returns fs-verity's digest of an object to which the caller holds a reference. added says that the object had none
// before, so that its bytes were read with buf: it is not yet sure to survive a power cut then. What is damaged is bad from then on, and
// the error wraps ErrDamaged.
//
// Whoever replaces the object meanwhile puts the same bytes, and these have the same digest.
func (s *Store) Digest(ctx context.Context, id content.ObjectID, buf func() *VerifyBuffer) (d verity.Digest, added bool, err error) {
	d, added, err = s.digest(ctx, id, buf)
	if errors.Is(err, ErrDamaged) {
		s.SetBad(id)
	}
	return d, added, err
}

func (s *Store) digest(ctx context.Context, id content.ObjectID, buf func() *VerifyBuffer) (d verity.Digest, added bool, err error) {
	fd, err := s.shard(id).open(id, 0)
	if err != nil {
		return d, false, err
	}
	defer unix.Close(fd)
	if d, err = verity.Measure(fd); err == nil {
		return d, false, nil
	}
	if !errors.Is(err, verity.ErrNone) {
		return d, false, fmt.Errorf("object %s is %w: %w", id, ErrDamaged, err)
	}
	if added, err = s.protect(id, fd); err != nil {
		return d, false, err
	}
	// The tree of hashes was made of what the file held, right or wrong. What is read now agrees with it.
	if _, err := hashFile(ctx, id, fd, buf()); err != nil {
		return d, added, err
	}
	if d, err = verity.Measure(fd); err != nil {
		return d, added, fmt.Errorf("object %s is %w: %w", id, ErrDamaged, err)
	}
	return d, added, nil
}

// protect gives an object that was written without it fs-verity, and accounts for that.
func (s *Store) protect(id content.ObjectID, fd int) (added bool, err error) {
	var st unix.Stat_t
	if added, err = verity.Enable(fd); err == nil && added {
		if err = unix.Fstat(fd, &st); err == nil {
			s.bytes.Add(s.occupies(st.Size, true) - s.occupies(st.Size, false))
		}
	}
	if errors.Is(err, unix.EIO) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		err = fmt.Errorf("object %s: %w", id, err)
	}
	return added, err
}
