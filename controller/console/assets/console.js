// What the console's pages do by themselves: times count on, a mark says whether
// the page is live, "/" leads to the search, a stream that was ended leads to
// the sign-in.
(function () {
  'use strict';

  // The browser's clock may be wrong: times count from the controller's.
  var ahead = Date.now() - Date.parse(document.body.dataset.now);

  function ago(ms) {
    var s = Math.max(Math.floor(ms / 1000), 0);
    if (s < 120) return s + ' s ago';
    if (s < 7200) return Math.floor(s / 60) + ' min ago';
    if (s < 172800) return Math.floor(s / 3600) + ' h ago';
    return Math.floor(s / 86400) + ' days ago';
  }

  function count() {
    var now = Date.now() - ahead;
    document.querySelectorAll('time[data-ago]').forEach(function (t) {
      var at = Date.parse(t.dateTime);
      var text = at > 0 ? ago(now - at) : 'never';
      if (t.textContent !== text) t.textContent = text;
    });
    first();
  }

  // The first device of an empty fleet: its row has come, where nobody sees it.
  var asked = false;
  function first() {
    if (asked || !document.querySelector('.empty') || !document.querySelector('#rows tr')) return;
    asked = true;
    htmx.ajax('GET', location.href, { target: '#fleet', select: '#fleet', swap: 'outerHTML' }).finally(function () { asked = false; });
  }
  setInterval(count, 1000);

  function mark(state, word) {
    var live = document.getElementById('live');
    if (!live || live.dataset.state === state) return;
    live.dataset.state = state;
    live.querySelector('.word').textContent = word;
  }
  document.addEventListener('htmx:sseOpen', function () { mark('live', 'Live'); });
  document.addEventListener('htmx:sseError', function () { mark('lost', 'Reconnecting'); });
  document.addEventListener('htmx:sseMessage', count);
  document.addEventListener('htmx:sseClose', function (e) {
    if (e.detail.type === 'message') location.reload(); // it leads to the sign-in
  });

  // A command beside a button of data-copy is copied. Pages of plain HTTP have no
  // clipboard; the text is then selected, and copied as by hand.
  document.documentElement.classList.add('js');
  document.addEventListener('click', function (e) {
    var button = e.target.closest('[data-copy]');
    if (!button) return;
    var code = button.parentNode.querySelector('code');
    var shown = button.querySelector('.word');
    function said(word) {
      shown.textContent = word;
      button.parentNode.querySelector('[role=status]').textContent = word;
      setTimeout(function () { shown.textContent = 'Copy'; }, 2000);
    }
    function select() {
      var range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      said(document.execCommand('copy') ? 'Copied' : 'Selected');
    }
    if (!navigator.clipboard) return select();
    navigator.clipboard.writeText(code.textContent).then(function () { said('Copied'); }, select);
  });

  document.addEventListener('keydown', function (e) {
    var q = document.getElementById('q');
    var at = document.activeElement;
    if (e.key === '/' && q && !e.ctrlKey && !e.metaKey && !e.altKey && !/^(INPUT|TEXTAREA|SELECT)$/.test(at.tagName)) {
      e.preventDefault();
      q.focus();
      q.select();
    }
  });
})();
