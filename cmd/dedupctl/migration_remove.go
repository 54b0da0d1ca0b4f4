package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// check makes sure that To has all of an image and can show it, and that containerd will keep it.
func (m *migration) check(ctx context.Context, s *stack) (err error) {
	sn := m.ctd.SnapshotService(m.to)
	for _, chain := range s.chains {
		if have, err := exists(ctx, sn, chain); err != nil || !have {
			return errors.Join(fmt.Errorf("%s has no snapshot %s", m.to, chain), err)
		}
	}
	info, err := m.ctd.ContentStore().Info(ctx, s.config)
	if err != nil {
		return err
	}
	if info.Labels[gcLabel(m.to)] != s.top() {
		return fmt.Errorf("nothing keeps the snapshots of %s: config %s has no label %s", m.to, s.config, gcLabel(m.to))
	}
	ctx, release, err := m.ctd.WithLease(ctx)
	if err != nil {
		return fmt.Errorf("take a lease: %w", err)
	}
	defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()
	key := fmt.Sprintf("dedupctl-check-%d-%s", time.Now().UnixNano(), s.config)
	// dedup reads every tree of the chain for a view, and makes and mounts the chain image.
	if _, err := sn.View(ctx, key, s.top()); err != nil {
		return fmt.Errorf("make a view with %s: %w", m.to, err)
	}
	return sn.Remove(context.WithoutCancel(ctx), key)
}

// settled are the images of a namespace that To has now, or will have (in a dry run).
func (m *migration) settled(namespace string) (list []*stack) {
	for _, s := range m.stacks {
		if s.Namespace != namespace {
			continue
		}
		if s.State == stateMigrated || s.State == statePresent || m.out.DryRun && s.State == stateMigrate {
			list = append(list, s)
		}
	}
	return list
}

// old are the snapshots of From in one namespace.
type old struct {
	infos map[string]snapshots.Info
	used  map[string]bool // below a container's, or something else that is no image
	sizes map[string]int64
}

// lookAtOld finds the snapshots of From in a namespace: which are in use, and what those of images to be removed
// occupy.
func (m *migration) lookAtOld(ctx context.Context, namespace string) (o old, err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	o = old{map[string]snapshots.Info{}, map[string]bool{}, map[string]int64{}}
	err = m.ctd.SnapshotService(m.from).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		o.infos[info.Name] = info
		return nil
	})
	if err != nil {
		return o, fmt.Errorf("list snapshots of %s: %w", m.from, err)
	}
	if err := m.markUsed(ctx, o); err != nil {
		return o, err
	}
	for _, s := range m.settled(namespace) {
		for _, chain := range s.chains {
			if _, ok := o.sizes[chain]; ok || o.infos[chain].Name == "" {
				continue
			}
			u, err := m.ctd.SnapshotService(m.from).Usage(ctx, chain)
			if err != nil && !errdefs.IsNotFound(err) {
				return o, fmt.Errorf("size of snapshot %s: %w", chain, err)
			}
			o.sizes[chain] = u.Size
		}
	}
	return o, nil
}

// markUsed marks what lies below containers, and what images need that stay.
func (m *migration) markUsed(ctx context.Context, o old) error {
	use := func(name string) {
		for name != "" && !o.used[name] {
			o.used[name] = true
			name = o.infos[name].Parent
		}
	}
	for name, info := range o.infos {
		if info.Kind != snapshots.KindCommitted {
			use(name)
		}
	}
	namespace, _ := namespaces.Namespace(ctx)
	ours := map[digest.Digest]bool{}
	for _, s := range m.settled(namespace) {
		ours[s.config] = true
	}
	err := m.ctd.ContentStore().Walk(ctx, func(info content.Info) error {
		if !ours[info.Digest] {
			use(info.Labels[gcLabel(m.from)])
		}
		return nil
	}, fmt.Sprintf("labels.%q", gcLabel(m.from)))
	if err != nil {
		return fmt.Errorf("look for images of %s: %w", m.from, err)
	}
	return nil
}

// namespaces are those of the images at hand.
func (m *migration) namespaces() []string {
	set := map[string]bool{}
	for _, s := range m.stacks {
		set[s.Namespace] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// remove takes From's snapshots of the images away that To has: it takes the label off that keeps them, and has
// containerd collect its garbage. What a container uses, containerd keeps. In a dry run nothing is removed, and
// everything counted.
func (m *migration) remove(ctx context.Context) error {
	for _, ns := range m.namespaces() {
		nsCtx := namespaces.WithNamespace(ctx, ns)
		if !m.out.DryRun {
			for _, s := range m.settled(ns) {
				if err := m.check(nsCtx, s); err != nil {
					s.State, s.Error = stateFailed, err.Error()
				}
			}
		}
		before, err := m.lookAtOld(ctx, ns)
		if err != nil {
			return err
		}
		gone := func(name string) bool { return !before.used[name] }
		if !m.out.DryRun {
			after, err := m.collect(nsCtx, ns)
			if err != nil {
				return err
			}
			gone = func(name string) bool { return after[name].Name == "" }
		}
		kept := false
		for name, size := range before.sizes {
			if gone(name) {
				m.out.Removed++
				m.out.RemovedBytes += size
			} else {
				m.out.Kept++
				kept = true
			}
		}
		if kept {
			if err := m.users(nsCtx, ns, before); err != nil {
				return err
			}
		}
	}
	return nil
}

// collect takes the labels off and collects garbage. It returns what From has then.
func (m *migration) collect(ctx context.Context, namespace string) (map[string]snapshots.Info, error) {
	for _, s := range m.settled(namespace) {
		label := gcLabel(m.from)
		_, err := m.ctd.ContentStore().Update(ctx, content.Info{Digest: s.config, Labels: map[string]string{label: ""}},
			"labels."+label)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("release the snapshots of %s: %w", s.Names[0], err)
		}
	}
	l, err := m.ctd.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		return nil, fmt.Errorf("collect garbage: %w", err)
	}
	if err := m.ctd.LeasesService().Delete(ctx, l, leases.SynchronousDelete); err != nil {
		return nil, fmt.Errorf("collect garbage: %w", err)
	}
	left := map[string]snapshots.Info{}
	err = m.ctd.SnapshotService(m.from).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		left[info.Name] = info
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list snapshots of %s: %w", m.from, err)
	}
	return left, nil
}

// users notes who lies on snapshots of the images: containers of containerd's, and what else has made a snapshot.
// Docker tells containerd of a container only when it starts; it names the snapshots after it.
func (m *migration) users(ctx context.Context, namespace string, o old) error {
	all, err := m.ctd.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containers of namespace %s: %w", namespace, err)
	}
	owner := map[string]string{} // snapshot -> container
	for _, c := range all {
		if c.Snapshotter == m.from {
			owner[c.SnapshotKey] = c.ID
		}
	}
	users := map[string]bool{}
	for key, info := range o.infos {
		if info.Kind == snapshots.KindCommitted {
			continue
		}
		name := key
		for name != "" {
			if _, ok := o.sizes[name]; ok {
				id, ok := owner[key]
				if !ok {
					id = strings.TrimSuffix(key, "-init")
				}
				users[namespace+"/"+id] = true
				break
			}
			name = o.infos[name].Parent
		}
	}
	m.out.Containers = append(m.out.Containers, slices.Sorted(maps.Keys(users))...)
	return nil
}
