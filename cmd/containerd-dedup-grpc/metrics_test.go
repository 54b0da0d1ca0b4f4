package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// A scrape of a daemon that has ingested and removed shows what it did; names follow the conventions, and
// documentation, alerts and dashboard name what there is.
func TestMetrics(t *testing.T) {
	c := testConfig(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.MetricsAddress = l.Addr().String()
	l.Close()
	stop := start(t, c)
	ingest(t, c)
	url := "http://" + c.MetricsAddress + "/metrics"
	live, freed := packed(t)
	scrape := fetch(t, url)
	// a layer goes in the background
	for i := 0; i < 6000 && !strings.Contains(scrape, "\ndedup_gc_layers_total 1\n"); i++ {
		time.Sleep(10 * time.Millisecond)
		scrape = fetch(t, url)
	}
	problems, err := promlint.New(strings.NewReader(scrape)).Lint()
	problems = slices.DeleteFunc(problems, func(p promlint.Problem) bool { return !strings.HasPrefix(p.Metric, "dedup_") })
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	for _, want := range []string{
		"dedup_layers 1", "dedup_objects 1", "dedup_packs 1", fmt.Sprintf(`dedup_pack_bytes{state="live"} %d`, live),
		`dedup_pack_bytes{state="dead"} 0`, "dedup_logical_bytes 100000", "dedup_logical_inodes 2",
		`dedup_snapshots{kind="committed"} 1`, `dedup_snapshots{kind="active"} 1`, `dedup_snapshots{kind="view"} 0`,
		`dedup_layer_requests_total{door="prepare",reason="unknown",result="miss"} 1`,
		`dedup_layer_requests_total{door="prepare",reason="chain",result="hit"} 0`,
		`dedup_layer_requests_total{door="commit",reason="new",result="miss"} 2`,
		`dedup_ingests_total{result="new",source="directory"} 2`, `dedup_ingest_bytes_total{source="directory"} 150000`,
		"dedup_gc_layers_total 1", "dedup_gc_packs_total 1", fmt.Sprintf("dedup_gc_bytes_total %d", freed),
		`dedup_gc_errors_total{what="layer"} 0`,
		`dedup_grpc_errors_total{code="NotFound",method="Stat"} 1`, "dedup_damaged_layers 0",
		`dedup_work_running{work="build"} 0`, `dedup_work_running{work="ingest"} 0`,
		`dedup_work_oldest_seconds{work="build"} 0`,
		`dedup_work_memory_bytes{work="ingest"} 0`,
		`dedup_grpc_seconds_count{method="Prepare"} 3`, `dedup_grpc_seconds_count{method="Commit"} 2`,
		`dedup_grpc_seconds_count{method="Mounts"} 0`, `dedup_grpc_seconds_count{method="Apply"} 0`,
		`dedup_grpc_seconds_count{method="Diff"} 0`,
		`dedup_grpc_seconds_bucket{method="Commit",le="300"} 2`,
		`dedup_fsck_findings{kind="object"} 0`, `dedup_fsck_findings{kind="orphan"} 1`,
	} {
		if !strings.Contains(scrape, "\n"+want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	// Free and used have one base, which is that of dedupctl status: what is reserved for root is neither.
	var st unix.Statfs_t
	if err := unix.Statfs(c.Root, &st); err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(scrape, "\n") {
		text, ok := strings.CutPrefix(line, "dedup_root_size_bytes ")
		size, err := strconv.ParseFloat(text, 64)
		if ok && (err != nil || size > float64(st.Blocks-st.Bfree+st.Bavail)*float64(st.Frsize)*1.001) {
			t.Errorf("%s, of %d blocks with %d reserved", line, st.Blocks, st.Bfree-st.Bavail)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if t.Failed() {
		t.Log(scrape)
	}
	if resp, err := http.Get(url); err == nil {
		t.Errorf("metrics are served after the stop: %s", resp.Status)
	}
	names := metricNames(scrape)
	checkDocumented(t, names)
	checkReasons(t, scrape)
	checkAlerts(t, names)
	checkDashboard(t, names)
}

// packed is what a payload of 100,000 bytes takes in a pack here, and a pack with one of 50,000.
func packed(t *testing.T) (live, freed int) {
	t.Helper()
	kernel, err := lower.Examine(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if kernel.Dense != nil {
		return 102_400, 69_632
	}
	return 100_352, 61_440
}

func fetch(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status, err)
	}
	return string(body)
}

func metricNames(scrape string) (names []string) {
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (dedup_\S+)`).FindAllStringSubmatch(scrape, -1) {
		names = append(names, m[1])
	}
	return names
}

func checkDocumented(t *testing.T, names []string) {
	t.Helper()
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(dedup_[a-z_]+)").FindAllStringSubmatch(readFile(t,
		"../../docs/monitoring.md"), -1) {
		documented = append(documented, m[1])
	}
	slices.Sort(documented)
	if d := cmp.Diff(names, documented); d != "" {
		t.Errorf("metrics in docs/monitoring.md: %s", d)
	}
}

// checkReasons: the doors, results and reasons in the documentation's table are those that there are.
func checkReasons(t *testing.T, scrape string) {
	t.Helper()
	var counted, documented []string
	series := regexp.MustCompile(`dedup_layer_requests_total{door="(\w+)",reason="(\w+)",result="(\w+)"}`)
	for _, m := range series.FindAllStringSubmatch(scrape, -1) {
		counted = append(counted, m[1]+" "+m[3]+" "+m[2])
	}
	door := ""
	row := regexp.MustCompile("(?m)^\\| (?:`(\\w+)`)? ?\\| `(hit|miss)` \\| (`.*?`) \\|")
	for _, m := range row.FindAllStringSubmatch(readFile(t, "../../docs/monitoring.md"), -1) {
		if m[1] != "" {
			door = m[1]
		}
		for reason := range strings.SplitSeq(strings.ReplaceAll(m[3], "`", ""), ", ") {
			documented = append(documented, door+" "+m[2]+" "+reason)
		}
	}
	slices.Sort(counted)
	slices.Sort(documented)
	if d := cmp.Diff(counted, documented); d != "" {
		t.Errorf("reasons in docs/monitoring.md: %s", d)
	}
}

// ingest commits two directories through the socket and removes one, checks a store with a file too many, prepares a
// layer that nobody knows, and fails once.
func ingest(t *testing.T, c Config) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := snapshotsapi.NewSnapshotsClient(conn)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, size := range map[string]int{"kept": 100000, "gone": 50000} {
		made, err := client.Prepare(t.Context(), &snapshotsapi.PrepareSnapshotRequest{Key: "extract-k"})
		must(made, err)
		for _, o := range made.Mounts[0].Options {
			if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
				must(nil, os.WriteFile(filepath.Join(upper, "f"), bytes.Repeat([]byte("x"), size), 0o600))
			}
		}
		must(client.Commit(t.Context(), &snapshotsapi.CommitSnapshotRequest{Name: name, Key: "extract-k"}))
		// The ingest of a directory may run on in the background; what mounts it waits.
		must(client.View(t.Context(), &snapshotsapi.ViewSnapshotRequest{Key: "v", Parent: name}))
		must(client.Remove(t.Context(), &snapshotsapi.RemoveSnapshotRequest{Key: "v"}))
	}
	must(client.Remove(t.Context(), &snapshotsapi.RemoveSnapshotRequest{Key: "gone"}))
	must(client.Cleanup(t.Context(), &snapshotsapi.CleanupRequest{}))
	ref := "sha256:" + strings.Repeat("0", 64)
	must(client.Prepare(t.Context(), &snapshotsapi.PrepareSnapshotRequest{Key: "extract-1",
		Labels: map[string]string{"containerd.io/snapshot.ref": ref}}))
	must(nil, os.WriteFile(filepath.Join(c.Root, "packs/stray"), nil, 0o400)) // nothing names it
	fsck, err := dedupv1.NewControlClient(conn).Check(t.Context(), &dedupv1.CheckRequest{})
	must(fsck, err)
	for err == nil {
		_, err = fsck.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if _, err := client.Stat(t.Context(), &snapshotsapi.StatSnapshotRequest{Key: "none"}); err == nil {
		t.Fatal("a snapshot that there is not")
	}
}

// hangsUp is a collector of many families that are ready when the scraper has gone.
type hangsUp struct{ scraper net.Conn }

func (hangsUp) Describe(chan<- *prometheus.Desc) {}

func (h hangsUp) Collect(out chan<- prometheus.Metric) {
	_ = h.scraper.(*net.TCPConn).SetLinger(0) // the server's next write fails
	_ = h.scraper.Close()
	for i := range 200 {
		emitter{out}.gauge(fmt.Sprintf("dedup_test_%d", i), strings.Repeat("help ", 100), 1)
	}
}

// A scraper that hangs up leaves nothing in the log.
func TestScraperHangsUp(t *testing.T) {
	var said bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&said)
	served := make(chan struct{})
	reg := prometheus.NewRegistry()
	handler := metricsHandler(reg, logger)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(served)
		handler.ServeHTTP(w, r)
	}))
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err == nil {
		err = reg.Register(hangsUp{conn})
	}
	if err == nil {
		_, err = io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
	}
	if err != nil {
		t.Fatal(err)
	}
	<-served
	if said.Len() > 0 {
		t.Errorf("%d lines in the log: %.300s", strings.Count(said.String(), "\n"), said.String())
	}
}
