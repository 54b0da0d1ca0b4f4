package integration

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// What Prometheus scrapes tells a first pull from one of known layers, and sees an image go.
func TestMetrics(t *testing.T) {
	t.Parallel()
	address := freeAddress(t)
	n := startDedup(t, node.Options{Daemon: map[string]any{"metrics_address": address}})
	ctx, first, second := testContext(t), startRegistry(t), startRegistry(t)
	layers := []*image.Layer{busybox(t), layer(t, payload("metrics", "data", 3<<20)), layer(t, image.File("small", "s"))}
	ref := push(t, first, "app:1", layers...)
	pull(t, n, node.Snapshotter, ref)

	const requests = "dedup_layer_requests_total"
	after := scrape(t, address)
	// Layers are ingested ahead of their turn, and served or ingested in Prepare once their blobs are there: no hits.
	misses := after.sum(requests, `door="prepare"`, `result="miss"`)
	brought := after.sum(requests, `door="apply"`, `result="miss"`) + after.sum(requests, `door="prepare"`,
		`reason="ahead"`) +
		after.sum(requests, `door="prepare"`, `reason="ingested"`)
	if misses != 3 || brought != 3 || after.sum(requests, `result="hit"`) != 0 {
		t.Errorf("a first pull of three layers: %v", after.of(requests))
	}
	if got := after.sum("dedup_ingests_total", `source="blob"`, `result="new"`); got != 3 {
		t.Errorf("%v layers were ingested, want 3", got)
	}
	if got, added := after.sum("dedup_ingest_bytes_total"), after.sum("dedup_ingest_added_bytes_total"); got < 4<<20 ||
		added < 4<<20 || added > 2*got {
		t.Errorf("%v bytes were read, %v added", got, added)
	}
	if after.sum("dedup_ingest_seconds_total", `stage="read"`) <= 0 ||
		after.sum("dedup_ingest_seconds_total", `stage="sync"`) <= 0 {
		t.Errorf("no time was spent: %v", after.of("dedup_ingest_seconds_total"))
	}

	// The same layers, in another order: neither containerd nor dedup has these snapshots.
	other := push(t, second, "other:1", layers[2], layers[0], layers[1])
	pull(t, n, node.Snapshotter, other)
	before, after := after, scrape(t, address)
	if hits := after.sum(requests, `door="prepare"`, `result="hit"`); hits != 3 ||
		after.sum(requests) != before.sum(requests)+3 {
		t.Errorf("a pull of three known layers: %v", after.of(requests))
	}
	if before.sum("dedup_ingest_bytes_total") != after.sum("dedup_ingest_bytes_total") {
		t.Error("bytes were read for known layers")
	}
	// Both images are counted, what is stored is so once.
	logical, stored := after.sum("dedup_logical_bytes"), after.sum("dedup_stored_bytes")
	if logical < 2*(3<<20) || stored > 8<<20 || after.sum("dedup_ratio") != logical/stored ||
		after.sum("dedup_saved_bytes") != logical-stored {
		t.Errorf("logical %v, stored %v, ratio %v, saved %v", logical, stored, after.sum("dedup_ratio"),
			after.sum("dedup_saved_bytes"))
	}

	for _, ref := range []string{ref, other} {
		must(t, n.Client().ImageService().Delete(ctx, ref))
	}
	forget(t, n, ctx, nil) // collects garbage
	eventually(t, "the layers to be gone", func() bool { return scrape(t, address).sum("dedup_layers") == 0 })
	after = scrape(t, address)
	if after.sum("dedup_gc_layers_total") != 3 || after.sum("dedup_gc_bytes_total") < 4<<20 ||
		after.sum("dedup_gc_errors_total") != 0 {
		t.Errorf("%v layers and %v bytes were removed, with %v errors", after.sum("dedup_gc_layers_total"),
			after.sum("dedup_gc_bytes_total"), after.sum("dedup_gc_errors_total"))
	}
}

// freeAddress returns a loopback address on which nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, l.Close())
	return l.Addr().String()
}

// samples are the lines of a scrape.
type samples map[string]float64

func scrape(t *testing.T, address string) samples {
	t.Helper()
	body, err := httpGet("http://" + address + "/metrics")
	must(t, err)
	s := samples{}
	for _, m := range regexp.MustCompile(`(?m)^(\w+(?:\{.*\})?) (\S+)$`).FindAllSubmatch(body, -1) {
		v, err := strconv.ParseFloat(string(m[2]), 64)
		must(t, err)
		s[string(m[1])] = v
	}
	return s
}

func httpGet(url string) ([]byte, error) {
	resp, err := http.Get(url)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("get %s: %s", url, resp.Status)
	}
	return io.ReadAll(resp.Body)
}

// of returns the samples of a metric that have all labels, written name="value".
func (s samples) of(metric string, labels ...string) samples {
	out := samples{}
	for name, v := range s {
		ok := regexp.MustCompile(fmt.Sprintf(`^%s(\{|$)`, metric)).MatchString(name)
		for _, l := range labels {
			ok = ok && regexp.MustCompile(`[{,]`+regexp.QuoteMeta(l)+`[,}]`).MatchString(name)
		}
		if ok {
			out[name] = v
		}
	}
	return out
}

func (s samples) sum(metric string, labels ...string) (sum float64) {
	for _, v := range s.of(metric, labels...) {
		sum += v
	}
	return sum
}
