package signing

import (
	"fmt"
	"strings"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Describe says in lines of text what a trust document says.
func Describe(d *dunlinv1.TrustDocument) string {
	var b strings.Builder
	fmt.Fprintf(&b, "trust document %d, issued %s, expires %s\n", d.GetVersion(), d.GetIssuedAt().AsTime().Format(time.RFC3339), d.GetExpiresAt().AsTime().Format(time.RFC3339))
	for _, list := range []struct {
		name string
		keys []*dunlinv1.TrustKey
	}{{"root", d.GetRootKeys()}, {"controller", d.GetControllerKeys()}, {"publisher", d.GetPublisherKeys()}, {"agent", d.GetAgentKeys()}} {
		for _, k := range list.keys {
			fmt.Fprintf(&b, "%s key %s", list.name, k.GetKeyId())
			if len(k.GetCertificate()) > 0 {
				b.WriteString(" (authority)")
			}
			if k.GetNotBefore() != nil {
				fmt.Fprintf(&b, " from %s", k.GetNotBefore().AsTime().Format(time.RFC3339))
			}
			if k.GetNotAfter() != nil {
				fmt.Fprintf(&b, " until %s", k.GetNotAfter().AsTime().Format(time.RFC3339))
			}
			if k.GetComment() != "" {
				fmt.Fprintf(&b, " %q", k.GetComment())
			}
			b.WriteByte('\n')
		}
	}
	if d.GetRequirePublisher() {
		b.WriteString("a publisher's signature is required\n")
	}
	if d.GetAgentFloor() != "" {
		fmt.Fprintf(&b, "agents from %s on\n", d.GetAgentFloor())
	}
	for _, f := range d.GetModelFloors() {
		fmt.Fprintf(&b, "model %s from version %d on\n", f.GetModel(), f.GetVersion())
	}
	return b.String()
}
