// Before the first paint: a theme chosen earlier, so that the page does not flash in the other one.
"use strict";
try {
  const theme = JSON.parse(localStorage.getItem("monoblock.settings") || "{}").theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage, or a damaged entry: the system's theme.
}
