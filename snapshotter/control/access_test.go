package control

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// marker is in files that no answer may show, and inner in files of an image, neither.
const (
	marker = "outside-5f0c2c6d"
	inner  = "inside-90be1b44"
)

// fixture is a served store that holds an image which names files outside of it wherever an image can.
type fixture struct {
	conn   *grpc.ClientConn
	secret string
	watch  int // of everything that opens the secret
}

// raw leaves messages as they are on the wire.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (raw) Unmarshal(b []byte, v any) error { *v.(*[]byte) = bytes.Clone(b); return nil }
func (raw) Name() string                    { return "proto" }

func newFixture(t testing.TB) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the snapshotter mounts EROFS and overlayfs")
	}
	dir := t.TempDir()
	f := &fixture{secret: filepath.Join(dir, "secret")}
	if err := os.WriteFile(f.secret, []byte(marker+strings.Repeat("x", 5000)), 0o600); err != nil {
		t.Fatal(err)
	}
	sn, err := snapshotter.New(t.Context(), snapshotter.Options{Root: filepath.Join(dir, "root"),
		RunDir: filepath.Join(dir, "run")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sn.Close(); err != nil {
			t.Error(err)
		}
	})
	image := f.hostile(t)
	if _, err := sn.Layers().IngestBlob(t.Context(), layer.Blob{
		Digest: digest.FromBytes(image), Size: int64(len(image)),
		Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(image)), nil },
	}); err != nil {
		t.Fatal(err)
	}
	nobody, err := grpc.NewClient("unix://"+filepath.Join(dir, "none"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nobody.Close() })
	catalog := blobs.NewCatalog(nobody, "")
	stored := func(ctx context.Context) (blobs.Stored, error) { return snapshotter.StoredLayers(ctx, sn) }
	f.serve(t, New(sn, Options{Root: filepath.Join(dir, "root"), Catalog: catalog,
		Trimmer: blobs.NewTrimmer(catalog, blobs.New(nil, nil), stored, nil, nil)}))
	if f.watch, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(f.watch) })
	if _, err := unix.InotifyAddWatch(f.watch, f.secret,
		unix.IN_OPEN|unix.IN_ACCESS|unix.IN_MODIFY|unix.IN_ATTRIB|unix.IN_DELETE_SELF); err != nil {
		t.Fatal(err)
	}
	return f
}

// hostile is a layer whose links and lists of packages lead to the secret.
func (f *fixture) hostile(t testing.TB) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	body := strings.Repeat(inner, 100)
	up := strings.Repeat("../", 20) + f.secret[1:]
	for _, h := range []*tar.Header{
		{Name: "objects", Typeflag: tar.TypeSymlink, Linkname: filepath.Dir(f.secret)},
		{Name: "etc/shadow", Typeflag: tar.TypeSymlink, Linkname: f.secret},
		{Name: "var/lib/dpkg/info/libc6.list", Size: int64(len(f.secret) + len(body))},
		{Name: "usr/lib/python3/site-packages/x-1.dist-info/RECORD", Size: int64(len(up) + len(body))},
		{Name: "usr/lib/python3/site-packages/y-1.dist-info/RECORD", Typeflag: tar.TypeSymlink, Linkname: f.secret},
		{Name: "usr/lib/file.txt", Size: int64(len(body))},
	} {
		h.Mode = 0o644
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		prefix := map[bool]string{true: f.secret, false: up}[strings.HasSuffix(h.Name, ".list")]
		if h.Size > 0 {
			if _, err := io.WriteString(w, (prefix + body)[len(prefix)+len(body)-int(h.Size):]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (f *fixture) serve(t testing.TB, s *Server) {
	dir, err := os.MkdirTemp("", "control-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	dedupv1.RegisterControlServer(server, s)
	go func() { _ = server.Serve(l) }()
	f.conn, err = grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.conn.Close()
		server.Stop()
		_ = os.RemoveAll(dir)
	})
}

// ask sends a request as it is, and returns everything that comes back.
func (f *fixture) ask(t testing.TB, method string, body []byte) (answer []byte, err error) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := f.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method, grpc.ForceCodec(raw{}))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(stream.SendMsg(&body), stream.CloseSend()); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	for {
		var part []byte
		if err := stream.RecvMsg(&part); errors.Is(err, io.EOF) {
			return answer, nil
		} else if err != nil {
			return answer, err
		}
		answer = append(answer, part...)
	}
}

func methods() (names []string) {
	for _, m := range dedupv1.Control_ServiceDesc.Methods {
		names = append(names, "/"+dedupv1.Control_ServiceDesc.ServiceName+"/"+m.MethodName)
	}
	for _, s := range dedupv1.Control_ServiceDesc.Streams {
		names = append(names, "/"+dedupv1.Control_ServiceDesc.ServiceName+"/"+s.StreamName)
	}
	return names
}

// FuzzControlShowsNoFiles sends any bytes to any method: no answer and no error may hold a byte of a file, of the node
// or of an image, and no file outside of the store may even be opened.
func FuzzControlShowsNoFiles(f *testing.F) {
	fixture := newFixture(f)
	all := methods()
	names := []string{fixture.secret, "../../secret", "/etc/shadow", "sha256:" + strings.Repeat("0", 64),
		strings.Repeat("f", 64), "x\x00y", strings.Repeat("../", 2000)}
	for i := range all {
		f.Add(uint8(i), []byte{})
		for field := protowire.Number(1); field <= 3; field++ {
			f.Add(uint8(i), protowire.AppendVarint(protowire.AppendTag(nil, field, protowire.VarintType), 1))
			f.Add(uint8(i), protowire.AppendVarint(protowire.AppendTag(nil, field, protowire.VarintType), 1<<63))
			for _, name := range names {
				f.Add(uint8(i), protowire.AppendString(protowire.AppendTag(nil, field, protowire.BytesType), name))
			}
		}
	}
	for i, method := range all {
		if strings.HasSuffix(method, "/MakeBlob") {
			for _, name := range names {
				f.Add(uint8(i), marshal(f, &dedupv1.MakeBlobRequest{Namespace: name, Digest: name, Lease: name}))
				f.Add(uint8(i), marshal(f, &dedupv1.MakeBlobRequest{Namespace: "n", Digest: "sha256:" + name, Lease: "l"}))
			}
		}
	}
	f.Fuzz(func(t *testing.T, i uint8, body []byte) {
		method := all[int(i)%len(all)]
		answer, err := fixture.ask(t, method, body)
		text := string(answer)
		if err != nil {
			text += err.Error()
		}
		for _, secret := range []string{marker, inner} {
			if strings.Contains(text, secret) {
				t.Errorf("%s answers %q with the content of a file: %s", method, body, text)
			}
		}
		switch status.Code(err) {
		case codes.OK, codes.InvalidArgument, codes.FailedPrecondition, codes.NotFound:
		case codes.Internal: // what cannot be decoded
			if !strings.Contains(err.Error(), "unmarshal") {
				t.Errorf("%s answers %q with %v", method, body, err)
			}
		default:
			t.Errorf("%s answers %q with %v", method, body, err)
		}
		if n, err := unix.Read(fixture.watch, make([]byte, 4096)); n > 0 || !errors.Is(err, unix.EAGAIN) {
			t.Errorf("%s opens %s for %q", method, fixture.secret, body)
		}
	})
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil && !strings.Contains(err.Error(), "UTF-8") {
		t.Fatal(err)
	}
	return b
}

// The watch and the search work: what they look for is found where it is.
func TestAccessTestSees(t *testing.T) {
	f := newFixture(t)
	if answer, err := f.ask(t, "/dedup.v1.Control/Duplicates", nil); err != nil ||
		!bytes.Contains(answer, []byte("/usr/lib")) {
		t.Errorf("%q, %v", answer, err)
	}
	if b, err := os.ReadFile(f.secret); err != nil || !bytes.HasPrefix(b, []byte(marker)) {
		t.Fatal(err)
	}
	if n, err := unix.Read(f.watch, make([]byte, 4096)); n == 0 || err != nil {
		t.Errorf("reading the secret is not seen: %v", err)
	}
}

// No request names a file, an id or a digest. One that shall some day has to be checked before it reaches a path,
// and gets its attacks above.
func TestRequestsNameNothing(t *testing.T) {
	// These are only compared with names that containerd lists.
	compared := []string{"Trim.namespace", "Trim.images"}
	// A digest is parsed to 32 bytes and looked up in memory; the others go to containerd as they are.
	compared = append(compared, "MakeBlob.namespace", "MakeBlob.digest", "MakeBlob.lease")
	methods := dedupv1.File_dedup_v1_control_proto.Services().ByName("Control").Methods()
	for i := range methods.Len() {
		fields := methods.Get(i).Input().Fields()
		for j := range fields.Len() {
			kind, name := fields.Get(j).Kind().String(), string(methods.Get(i).Name()+"."+fields.Get(j).Name())
			if kind != "bool" && kind != "uint32" && !slices.Contains(compared, name) {
				t.Errorf("field %s is a %s", name, kind)
			}
		}
	}
}
