package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// prepareMapped is prepareUse for containers in user namespaces of their own.
func prepareMapped(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	u, err := s.use(ctx)
	return u.mapped, "", err
}

// mapped starts containers of one image, each with another mapping.
func (u use) mapped(ctx context.Context, t *Trial) error {
	// Root of a user namespace has to get to its files.
	for dir := filepath.Join(t.Dir(), "s"); strings.Contains(dir, "/dedup-"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil {
			return fmt.Errorf("let a user namespace pass: %w", err)
		}
	}
	if _, err := t.pull(ctx, u.img); err != nil {
		return err
	}
	var later []time.Duration
	for i := range uint32(21) {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: (i + 1) << 16, Size: 1 << 16}}
		d, err := t.firstOutputMapped(ctx, u.img, ids, "/bin/sh", "-c", "echo ok")
		if err != nil {
			return err
		}
		if i == 0 {
			t.record("mapped", "first container", "s", d.Seconds())
			continue
		}
		later = append(later, d)
	}
	slices.Sort(later)
	t.record("mapped", "20 more, median", "s", later[len(later)/2].Seconds())
	return nil
}
