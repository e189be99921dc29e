"""A Django project in one module: a model, views that send events, and the older project's sender."""

from __future__ import annotations

import textwrap
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.servers import gunicorn

_SITE = """
import json, os, sys
import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connection, models, transaction
from django.http import HttpResponse
from django.shortcuts import render
from django.urls import path

settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **json.loads(os.environ["DJANGO_DATABASE"])}},
    TEMPLATES=[{
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [os.path.dirname(__file__)],
        "OPTIONS": {"context_processors": ["context_processors.sse_server_url"]},
    }],
    SSE_SERVER_URL=os.environ["SSE_SERVER_URL"],
)
django.setup()


class Order(models.Model):
    dish = models.CharField(max_length=100)

    class Meta:
        app_label = "shop"


# As in sse_server_postgres_listen_notify.
def postgres_notify(channel, sse_payload):
    with connection.cursor() as cursor:
        cursor.execute(f"NOTIFY {channel}, '{json.dumps(sse_payload)}'")


def older(request):
    try:
        with transaction.atomic():
            order = Order.objects.create(dish=request.POST["dish"])
            postgres_notify(channel="Notifications", sse_payload={
                "event": "NEW_NOTIFICATION", "id": order.id, "data": json.dumps({"dish": order.dish}),
            })
            if "fail" in request.POST:
                raise ValueError
    except ValueError:
        pass
    return HttpResponse(Order.objects.count())


def page(request):
    return render(request, "page.html", {"postgres_sse_channel": "Notifications"})
"""


def django_site(folder: Path, code: str = "create_order = None", processor: str = "", page: str = "") -> None:
    """Write the project: `code` has the view `create_order`, `processor` the module of the context processor."""
    (folder / "shop_site.py").write_text(
        _SITE
        + code
        + textwrap.dedent("""

        urlpatterns = [path("", page), path("orders", create_order or page), path("older", older)]
        with connection.schema_editor() as editor:
            if Order._meta.db_table not in connection.introspection.table_names():
                editor.create_model(Order)
        application = get_wsgi_application()
        """)
    )
    (folder / "context_processors.py").write_text(processor or "def sse_server_url(request): return {}")
    (folder / "page.html").write_text(page)


def in_django(folder: Path) -> object:
    """Return the command line of the project's server, as a function of its port."""
    return lambda port: gunicorn("shop_site:application", port, "-k", "sync", "--pythonpath", str(folder))


def as_django_has_it(database_url: str) -> dict[str, object]:
    parts = urlsplit(database_url)
    return {"NAME": parts.path[1:], "USER": parts.username, "HOST": parts.hostname, "PORT": parts.port}
