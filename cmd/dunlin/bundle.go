package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/layout"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxReferrers bounds the list of a bundle's signatures.
const maxReferrers = 1 << 20

func (c *cli) bundleCommand() *cobra.Command {
	return group("bundle", "Carry model versions to devices that no network reaches", c.bundleExportCommand())
}

func (c *cli) bundleExportCommand() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "export MODEL:VERSION... -o PATH",
		Short: "Write versions as an OCI image layout",
		Long: `export writes the versions, their signatures, and the trust documents that
devices need to verify them, as an OCI image layout: into a folder, or into one
file where PATH ends in .tar. What a folder holds already stays, and an export
that was cut short is gone on with.

On a device, dunlin-agent import PATH takes it in.`,
		Example: "  dunlin bundle export digits:3 resnet50:7 -o /media/stick/models\n  dunlin bundle export digits:3 -o digits.tar",
		Args:    arguments(1, 1000),
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return usagef("-o is missing: a folder, or a file that ends in .tar")
			}
			return c.bundleExport(cmd.Context(), args, to)
		},
	}
	cmd.Flags().StringVarP(&to, "output", "o", "", "folder, or file that ends in .tar, to write")
	return cmd
}

func (c *cli) bundleExport(ctx context.Context, refs []string, to string) error {
	ctl, err := c.client()
	if err != nil {
		return err
	}
	who, err := call(ctx, ctl.auth().WhoAmI, &dunlinv1.WhoAmIRequest{})
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	registryURL, err := checkURL(who.GetRegistryUrl())
	if err != nil {
		return fmt.Errorf("the controller's registry: %w", err)
	}
	trust, err := call(ctx, ctl.trust().GetTrust, &dunlinv1.GetTrustRequest{})
	if err != nil {
		return fmt.Errorf("export: get trust documents: %w", err)
	}
	if _, err := signing.Advance(nil, trust.GetTrust()); err != nil {
		return fmt.Errorf("export: trust documents: %w", err)
	}
	var versions []*dunlinv1.ModelVersion
	for _, ref := range refs { // all of them are there, before anything is written
		v, err := findVersion(ctx, ctl, ref)
		if err != nil {
			return fmt.Errorf("export %s: %w", ref, err)
		}
		versions = append(versions, v)
	}
	var w layout.Writer
	var file *layout.Tar
	if strings.HasSuffix(to, ".tar") {
		file, err = layout.CreateTar(to)
		w = file
	} else {
		w, err = layout.CreateFolder(to)
	}
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	for _, v := range versions {
		if err == nil {
			p := &puller{http: ctl.http, base: registryURL + "/v2/" + v.GetModel(), authorization: bearer(ctl.Token).header()}
			if err = p.export(ctx, w, v); err != nil {
				err = fmt.Errorf("export %s:%d: %w", v.GetModel(), v.GetVersion(), err)
			}
		}
	}
	if err == nil {
		err = exportTrust(ctx, w, trust.GetTrust())
	}
	if file != nil {
		if err != nil {
			return errors.Join(err, file.Abort())
		}
		err = file.Close()
	}
	if err != nil {
		return err
	}
	for _, v := range versions {
		fmt.Fprintf(c.out, "%s:%d %s\n", v.GetModel(), v.GetVersion(), v.GetDigest())
	}
	return nil
}

func findVersion(ctx context.Context, ctl *client, ref string) (*dunlinv1.ModelVersion, error) {
	name, version, err := models.ParseRef(ref)
	if err == nil && version == 0 {
		err = errors.New("the version is missing: MODEL:VERSION")
	}
	if err != nil {
		return nil, usagef("%v", err)
	}
	res, err := call(ctx, ctl.models().ListModels, &dunlinv1.ListModelsRequest{Model: name})
	if err != nil {
		return nil, err
	}
	for _, v := range res.GetVersions() {
		if v.GetVersion() == version {
			return v, nil
		}
	}
	return nil, errors.New("there is no such version; dunlin get models lists them")
}

func exportTrust(ctx context.Context, w layout.Writer, trust []*dunlinv1.SignedTrust) error {
	blobs, manifest, err := layout.TrustArtifact(trust)
	if err != nil {
		return err
	}
	for _, d := range slices.Sorted(maps.Keys(blobs)) {
		if err := w.Put(ctx, d, int64(len(blobs[d])), layout.FromBytes(blobs[d])); err != nil {
			return fmt.Errorf("export trust documents: %w", err)
		}
	}
	return w.Commit([]ocispec.Descriptor{manifest})
}

// puller reads one repository of an OCI registry.
type puller struct {
	http          *http.Client
	base          string // URL of the repository: https://host/v2/name
	authorization string
}

// export writes a version and its signatures.
func (p *puller) export(ctx context.Context, w layout.Writer, v *dunlinv1.ModelVersion) error {
	bundle := digest.Digest(v.GetDigest())
	if err := bundle.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", bundle, err)
	}
	raw, err := p.small(ctx, "/manifests/"+bundle.String(), models.MaxManifestBytes)
	if err != nil {
		return err
	}
	m, err := models.ParseManifest(raw)
	if err != nil {
		return err
	}
	if m.Digest != bundle {
		return fmt.Errorf("the registry gives the manifest %s in place of %s", m.Digest, bundle)
	}
	manifests := []ocispec.Descriptor{{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: models.ArtifactType, Digest: bundle, Size: int64(len(raw)),
		Annotations: map[string]string{ocispec.AnnotationRefName: fmt.Sprintf("%s:%d", v.GetModel(), v.GetVersion())},
	}}
	blobs := layout.BlobsOf(m, int64(len(raw)))[1:]
	if err := w.Put(ctx, bundle, int64(len(raw)), layout.FromBytes(raw)); err != nil {
		return err
	}
	raw, err = p.small(ctx, "/referrers/"+bundle.String()+"?artifactType="+strings.ReplaceAll(signing.MediaType, "+", "%2B"), maxReferrers)
	if err != nil {
		return err
	}
	var referrers ocispec.Index
	if err := json.Unmarshal(raw, &referrers); err != nil {
		return fmt.Errorf("signatures: %w", err)
	}
	for _, r := range referrers.Manifests {
		raw, err := p.small(ctx, "/manifests/"+r.Digest.String(), signing.MaxManifestBytes)
		if err != nil {
			return err
		}
		subject, layer, err := signing.ParseManifest(raw)
		if err != nil {
			return err
		}
		if subject.Digest != bundle {
			return fmt.Errorf("signature %s is of %s", r.Digest, subject.Digest)
		}
		if err := w.Put(ctx, r.Digest, int64(len(raw)), layout.FromBytes(raw)); err != nil {
			return err
		}
		manifests = append(manifests, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: signing.MediaType, Digest: r.Digest, Size: int64(len(raw))})
		blobs = append(blobs, layer, ocispec.DescriptorEmptyJSON)
	}
	for _, b := range blobs {
		if err := w.Put(ctx, b.Digest, b.Size, p.blob(b.Digest)); err != nil {
			return err
		}
	}
	return w.Commit(manifests)
}

func (p *puller) get(ctx context.Context, path string, offset int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.base+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", p.authorization)
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest+", "+ocispec.MediaTypeImageIndex+", */*;q=0.1")
	want := http.StatusOK
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		want = http.StatusPartialContent
	}
	res, err := p.http.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != want {
		defer res.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody)) // what there is of a reason
		return nil, fmt.Errorf("GET %s: %s %.200s", path, res.Status, b)
	}
	return res, nil
}

// small reads an answer of at most limit bytes.
func (p *puller) small(ctx context.Context, path string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := p.get(ctx, path, 0)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("GET %s: the answer has more than %d bytes", path, limit)
	}
	return raw, err
}

// blob gives a blob's bytes.
func (p *puller) blob(d digest.Digest) layout.From {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		if d == ocispec.DescriptorEmptyJSON.Digest {
			return layout.FromBytes(ocispec.DescriptorEmptyJSON.Data)(ctx, offset)
		}
		res, err := p.get(ctx, "/blobs/"+d.String(), offset)
		if err != nil {
			return nil, err
		}
		return res.Body, nil
	}
}
