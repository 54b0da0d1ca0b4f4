package blobs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
)

// holding is a lease of ours in a namespace.
type holding struct {
	namespace, id string
}

// hold leases the blobs of a plan, so that a collection by anybody else leaves them until it is sure that they can go.
func (t *Trimmer) hold(ctx context.Context, plan TrimPlan) (held []holding, err error) {
	ctx, cancel := context.WithTimeout(ctx, collectTimeout)
	defer cancel()
	blobs := map[string][]digest.Digest{}
	for _, i := range plan.Images {
		for _, d := range i.refs {
			if d := digest.Digest(d); !slices.Contains(blobs[i.Namespace], d) {
				blobs[i.Namespace] = append(blobs[i.Namespace], d)
			}
		}
	}
	for namespace, list := range blobs {
		h, err := t.lease(ctx, namespace)
		if err != nil {
			return held, err
		}
		held = append(held, h)
		inside := namespaces.WithNamespace(ctx, namespace)
		for _, d := range list {
			_, err := t.catalog.leases.AddResource(inside, &leasesapi.AddResourceRequest{
				ID: h.id, Resource: &leasesapi.Resource{ID: d.String(), Type: "content"},
			})
			if err != nil {
				return held, fmt.Errorf("lease blob %s in namespace %s: %w", d, namespace, errgrpc.ToNative(err))
			}
		}
	}
	return held, nil
}

func (t *Trimmer) lease(ctx context.Context, namespace string) (holding, error) {
	h := holding{namespace, fmt.Sprint(leasePrefix, time.Now().UnixNano())}
	_, err := t.catalog.leases.Create(namespaces.WithNamespace(ctx, namespace), &leasesapi.CreateRequest{
		ID: h.id, Labels: map[string]string{labelExpire: time.Now().Add(holdFor).Format(time.RFC3339)},
	})
	if err != nil {
		return h, fmt.Errorf("take a lease in namespace %s: %w", namespace, errgrpc.ToNative(err))
	}
	return h, nil
}

// letGo ends leases, also for a caller who has gone. With collect, containerd then collects garbage, in all
// namespaces, and letGo waits for it.
func (t *Trimmer) letGo(ctx context.Context, held []holding, collect bool) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), collectTimeout)
	defer cancel()
	for at, h := range held {
		_, derr := t.catalog.leases.Delete(namespaces.WithNamespace(ctx, h.namespace), &leasesapi.DeleteRequest{
			ID: h.id, Sync: collect && at == len(held)-1,
		})
		if derr != nil {
			err = errors.Join(err, fmt.Errorf("end a lease in namespace %s: %w", h.namespace, errgrpc.ToNative(derr)))
		}
	}
	return err
}

// Collect has containerd collect garbage, in all namespaces, and waits for it.
func (t *Trimmer) Collect(ctx context.Context, namespace string) error {
	h, err := t.lease(ctx, namespace)
	if err != nil {
		return err
	}
	return t.letGo(ctx, []holding{h}, true)
}
