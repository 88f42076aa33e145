package broker

import (
	"crypto/tls"
	"crypto/x509"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
)

// startMosquitto starts one, with a controller that is connected to it.
func startMosquitto(t *testing.T) (*mosquitto, *External, inbox) {
	t.Helper()
	m := newMosquitto(t)
	m.start()
	e, connected := m.external(nil)
	in := newInbox()
	start(t, e, in.handle)
	wait(t, "connected", connected)
	return m, e, in
}

// TestMosquittoCutsOffTheRevoked within seconds, and nobody else: on the
// connection that it has, by the ACL, and on a new one, by the CRL; and ends
// that connection, when told to.
func TestMosquittoCutsOffTheRevoked(t *testing.T) {
	m, e, in := startMosquitto(t)
	clients := map[string]*client{}
	for _, name := range []string{"a", "b", "c"} {
		c := mustDial(t, m.address(), credentials{device: name})
		c.mustSubscribe(link.Down(name, "+"))
		clients[name] = c
	}
	for _, name := range []string{"a", "b"} { // one list of revoked certificates after the other
		m.revoke(name)
		began := time.Now()
		m.write()
		eventually(t, name+" is cut off", func() bool {
			mustPublish(t, e, link.Down(name, link.Desired), "x")
			mustPublish(t, e, link.Down("c", link.Desired), "x")
			clients["c"].inbox.want(t, link.Down("c", link.Desired), "x")
			clients[name].paho.Subscribe("nothing", 0, nil).WaitTimeout(patience)
			select {
			case <-clients[name].inbox:
				return false
			default:
				return true
			}
		})
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%s was cut off after %v", name, took)
		}
		clients[name].publish(link.Up(name, link.Hello), "revoked")
		for range 3 {
			e.Disconnect(name)
		}
		clients[name].wantCut()
	}
	clients["c"].publish(link.Up("c", link.Hello), "unharmed")
	in.want(t, link.Up("c", link.Hello), "unharmed")
	for name, want := range map[string]bool{"a": false, "b": false, "c": true, "d": true} {
		if _, err := dial(t, m.address(), credentials{device: name}); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMosquittoTakesNewCertificates, its own and those of a new authority,
// and forgets an old one, without a restart.
func TestMosquittoTakesNewCertificates(t *testing.T) {
	m, e, _ := startMosquitto(t)
	a := mustDial(t, m.address(), credentials{device: "a"})
	a.mustSubscribe(link.Down("a", "+"))

	m.files.Certificate = issue(trusted(), certified.key, ControllerUser)
	m.write()
	eventually(t, "the new certificate", func() bool {
		c, err := tls.Dial("tcp", m.address(), clientTLS(certificateOf("b")))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Equal(m.files.Certificate.Leaf)
	})

	second := newAuthority()
	ofSecond := credentials{device: "c", certificate: issue(second, certified.key, "c")}
	connects := func(cr credentials) bool {
		_, err := dial(t, m.address(), cr)
		return err == nil
	}
	if connects(ofSecond) {
		t.Error("an unknown authority counts")
	}
	m.files.Roots = append(m.files.Roots, second.Certificate)
	m.files.CRLs = append(m.files.CRLs, must(second.Revoke(nil, 1, time.Now(), time.Hour)))
	m.write()
	eventually(t, "a device of the new authority connects", func() bool { return connects(ofSecond) })
	if !connects(credentials{device: "b"}) {
		t.Error("the old authority counts no more")
	}
	m.files.Roots, m.files.CRLs = m.files.Roots[1:], m.files.CRLs[1:]
	m.write()
	eventually(t, "the old authority counts no more", func() bool { return !connects(credentials{device: "b"}) })
	if !connects(ofSecond) {
		t.Error("the new authority counts no more")
	}

	mustPublish(t, e, link.Down("a", link.Desired), "connected all the while")
	a.inbox.want(t, link.Down("a", link.Desired), "connected all the while")
}

func TestMosquittoEnrolment(t *testing.T) {
	m, e, in := startMosquitto(t)
	address := "127.0.0.1:" + strconv.Itoa(m.enrol)
	byToken := credentials{device: "x", anonymous: true, user: joinUser, password: passwordOf(joinUser)}
	connects := func(cr credentials) bool {
		_, err := dial(t, address, cr)
		return err == nil
	}
	if connects(byToken) {
		t.Fatal("a token counts that there is not")
	}
	_, id, _ := strings.Cut(joinUser, ".")
	m.files.JoinTokens[id] = must(HashPassword(passwordOf(joinUser)))
	m.write()
	eventually(t, "the token counts", func() bool { return connects(byToken) })
	for name, cr := range map[string]credentials{
		"wrong token":                  {device: "x", anonymous: true, user: joinUser, password: "x"},
		"no user name":                 {device: "x", anonymous: true},
		"a device's name":              {device: "a", anonymous: true, user: "a", password: "x"},
		"the controller's name":        {device: ControllerUser, anonymous: true, user: ControllerUser},
		"a device with a certificate":  {device: "a"},
		"a device with a name as well": {device: "a", user: "a", password: "x"},
	} {
		if connects(cr) {
			t.Errorf("%s: connected", name)
		}
	}

	a := mustDial(t, m.address(), credentials{device: "a"})
	a.mustSubscribe(link.Down("a", "+"))
	byToken.clientID = "a" // which takes over nothing
	for _, cr := range []credentials{byToken, {device: "y", anonymous: true, user: link.RenewUser, password: link.RenewUser}} {
		c := mustDial(t, address, cr)
		c.mustSubscribe(link.JoinDown(cr.user, "n"))
		for _, topic := range []string{link.Up("a", link.Hello), link.JoinUp(link.JoinUser("ffffffffffff"), "n"), link.JoinDown(cr.user, "n"), link.EpochTopic} {
			c.publish(topic, "forged")
		}
		c.subscribe("#", link.Down("a", "+"), link.JoinDown(link.JoinUser("ffffffffffff"), "n"))
		c.publish(link.JoinUp(cr.user, "n"), "request")
		in.want(t, link.JoinUp(cr.user, "n"), "request")
		mustPublish(t, e, link.Down("a", link.Desired), "not for others")
		a.inbox.want(t, link.Down("a", link.Desired), "not for others")
		mustPublish(t, e, link.JoinDown(link.JoinUser("ffffffffffff"), "n"), "not for others")
		mustPublish(t, e, link.JoinDown(cr.user, "n"), "answer")
		c.inbox.want(t, link.JoinDown(cr.user, "n"), "answer")
	}

	c := mustDial(t, address, byToken)
	clear(m.files.JoinTokens)
	m.write()
	c.wantCut()
	if connects(byToken) {
		t.Error("a token counts that there is no more")
	}
}

func TestMosquittoFiles(t *testing.T) {
	m := newMosquitto(t)
	old := map[string]os.FileInfo{}
	look := func() (changed []string) {
		t.Helper()
		files, err := os.ReadDir(m.Dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			info := must(f.Info())
			if !os.SameFile(old[f.Name()], info) {
				changed = append(changed, f.Name())
			}
			old[f.Name()] = info
		}
		return changed
	}
	if got, want := look(), []string{"acl", "ca.pem", "crl.pem", "mosquitto.conf", "passwords", "server.pem"}; !slices.Equal(got, want) {
		t.Errorf("wrote %v, want %v", got, want)
	}
	for _, name := range []string{mosquittoServer, mosquittoPasswords} {
		if got := old[name].Mode().Perm(); got != 0o600 {
			t.Errorf("%s has mode %v", name, got)
		}
	}
	for range 2 { // it has not been told yet
		if err := m.Write(m.files); err == nil || !strings.Contains(err.Error(), "not told") {
			t.Errorf("no PID file: %v", err)
		}
	}
	if got := look(); len(got) > 0 {
		t.Errorf("wrote %v again", got)
	}
	if err := os.Chmod(filepath.Join(m.Dir, mosquittoACL), 0o604); err != nil {
		t.Fatal(err)
	}
	m.revoke("b")
	m.files.Revoked = append(m.files.Revoked, "a")
	if err := m.Write(m.files); err == nil || !strings.Contains(err.Error(), "not told") {
		t.Errorf("no PID file: %v", err)
	}
	if got, want := look(), []string{"acl", "crl.pem"}; !slices.Equal(got, want) {
		t.Errorf("wrote %v, want %v", got, want)
	}
	if got := old[mosquittoACL].Mode().Perm(); got != 0o604 {
		t.Errorf("mode %v is not kept", got)
	}
	acl := string(must(os.ReadFile(filepath.Join(m.Dir, mosquittoACL))))
	if !strings.HasSuffix(acl, "\nuser a\ntopic deny #\n\nuser b\ntopic deny #\n") {
		t.Errorf("the ACL ends with %q", acl[len(acl)-60:])
	}

	hash := must(HashPassword("x"))
	for name, change := range map[string]func(*MosquittoFiles){
		"no certificate":            func(f *MosquittoFiles) { f.Certificate = nil },
		"no roots":                  func(f *MosquittoFiles) { f.Roots = nil },
		"no list of the revoked":    func(f *MosquittoFiles) { f.CRLs = nil },
		"a list that is none":       func(f *MosquittoFiles) { f.CRLs = [][]byte{{1}} },
		"a device with a line":      func(f *MosquittoFiles) { f.Revoked = []string{"a\nuser x"} },
		"a device with no name":     func(f *MosquittoFiles) { f.Revoked = []string{""} },
		"a token that is not one":   func(f *MosquittoFiles) { f.JoinTokens = map[string]string{"a:b": hash} },
		"a token with a line":       func(f *MosquittoFiles) { f.JoinTokens = map[string]string{"a\nb": hash} },
		"a password in the clear":   func(f *MosquittoFiles) { f.JoinTokens = map[string]string{"a": "secret"} },
		"a hash with another":       func(f *MosquittoFiles) { f.JoinTokens = map[string]string{"a": hash + "\nx:" + hash} },
		"a hash with one more part": func(f *MosquittoFiles) { f.JoinTokens = map[string]string{"a": hash + ":"} },
	} {
		files := m.files
		files.JoinTokens = maps.Clone(files.JoinTokens)
		change(&files)
		if err := m.Write(files); err == nil || strings.Contains(err.Error(), "told") || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := look(); len(got) > 0 {
		t.Errorf("wrote %v", got)
	}
	if err := (&Mosquitto{Dir: filepath.Join(m.Dir, "no")}).Write(m.files); err == nil {
		t.Error("written into a folder that is not there")
	}

	m.start()
	m.write()
	if err := os.Remove(filepath.Join(m.Dir, mosquittoPID)); err != nil {
		t.Fatal(err)
	}
	m.write() // nothing has changed: nobody need be told
}

func TestHashPassword(t *testing.T) {
	hash, other := must(HashPassword("x")), must(HashPassword("x"))
	if hash == other {
		t.Error("two hashes are the same")
	}
	parts := strings.Split(hash, "$")
	if len(parts) != 5 || parts[1] != "7" || parts[2] != strconv.Itoa(mosquittoIterations) || len(parts[3]) != 16 || len(parts[4]) != 88 {
		t.Errorf("hash %s is not of the form $7$<iterations>$<12 bytes>$<64 bytes>", hash)
	}
}

// TestReloadIsForMosquittoOnly: SIGHUP would end this very test.
func TestReloadIsForMosquittoOnly(t *testing.T) {
	m := &Mosquitto{Dir: t.TempDir()}
	if err := m.reload(); err == nil {
		t.Error("no PID file: no error")
	}
	for name, pid := range map[string]string{"this process": strconv.Itoa(os.Getpid()) + "\n", "empty": "", "words": "mosquitto", "a group": "-1",
		"all": "0", "init": "1", "nobody": "999999999", "long": strings.Repeat("1", 100)} {
		if err := os.WriteFile(filepath.Join(m.Dir, mosquittoPID), []byte(pid), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := m.reload(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestControllerUserIsNoDevice(t *testing.T) {
	if link.CheckDevice(ControllerUser) == nil {
		t.Errorf("a device can be called %s", ControllerUser)
	}
}

// TestMosquittoChain: what Mosquitto shows is verified from an older authority.
func TestMosquittoChain(t *testing.T) {
	second := newAuthority()
	second.Cross = []*x509.Certificate{must(trusted().Vouch(second.Certificate, longAgo))}
	m := newMosquitto(t)
	m.files.Certificate = issue(second, certified.key, ControllerUser)
	if err := m.Write(m.files); err == nil || !strings.Contains(err.Error(), "not told") {
		t.Fatal(err)
	}
	if got := must(pki.ReadCertificates(filepath.Join(m.Dir, mosquittoServer))); len(got) != 3 {
		t.Errorf("%d certificates, want 3", len(got))
	}
	m.start()
	mustDial(t, m.address(), credentials{device: "a"})
}
